"""Checkpoints and weights of a study's trials, on a disk that may be full or unavailable."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

from tuner.artifacts import publish
from tuner.cluster.trained_study import TrainedStudy
from tuner.errors import TrainingPausedError, reason_of
from tuner.logs import about

_RETRY_SECONDS = 5.0  #: between two attempts to read or write what the system refused
#: The disk is full, over its quota, or over the limit for one file.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class TrialFiles:
    """Reads and writes the files of one study while this process certainly drives it.

    What must not be lost is tried until the system allows it; the user is told once.
    """

    def __init__(
        self, study: TrainedStudy, *, say: Callable[[str], None], pausing: threading.Event
    ) -> None:
        """Opens the files of a study.

        Args:
            study: Whose trials they are of.
            say: Tells the user, a line at a time.
            pausing: Set when trials are to stay open, and nothing is to be waited for.
        """
        self._study = study
        self._say_line = say
        self._pausing = pausing
        self._is_unwritable = False  # and the user knows

    def read_checkpoint(self, trial: int) -> bytes | None:
        """The trial's checkpoint, however long it takes until it can be read; None without one.

        Raises:
            TrainingPausedError: The study is stopped meanwhile; the trial stays open.
        """
        path = self._study.artifacts.checkpoint(trial)
        is_told = False
        while True:
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None
            except (OSError, MemoryError) as error:
                if not is_told:
                    is_told = True
                    self._say(
                        f"Trial {trial} of {self._study.name}: {path} cannot be read "
                        f"({reason_of(error)}); the trial waits until it can. Nothing is lost. "
                        "Without that file it would train again from epoch 1.",
                        trial,
                    )
            self.wait_for_the_system()

    def keep_checkpoint(self, trial: int, content: bytes) -> None:
        """Writes a checkpoint; without room for it the trial continues, with an older one."""
        try:
            self._write(self._study.artifacts.checkpoint(trial), content)
        except OSError as error:
            self._say_cannot_be_written(error)

    def drop_checkpoint(self, trial: int, reason: str) -> None:
        """Removes a checkpoint that cannot be used: it costs epochs, never its trial."""
        self._study.renews_lease()
        self._study.artifacts.drop_checkpoint(trial)  # else the next one takes its place
        self._say(
            f"Trial {trial} of {self._study.name}: its checkpoint cannot be used and was removed "
            f"({reason.splitlines()[0][:200] if reason else 'no reason given'}). It trains again "
            "from epoch 1; what it reported stands.",
            trial,
        )

    def keep_weights(self, trial: int, content: bytes) -> None:
        """Writes the best weights, however long the disk takes to have room.

        Raises:
            TrainingPausedError: The study is stopped meanwhile; the trial stays open.
        """
        while True:
            try:
                return self._write(self._study.artifacts.weights(trial), content)
            except OSError as error:
                self._say_cannot_be_written(error)
            self.wait_for_the_system()

    def wait_for_the_system(self) -> None:
        """The pause before what the system refused is tried again.

        Raises:
            TrainingPausedError: The study is stopped; the trial stays open.
        """
        if self._pausing.wait(_RETRY_SECONDS):
            raise TrainingPausedError

    def _write(self, path: Path, content: bytes) -> None:
        """Writes a file, unless another coordinator took over: then `renews_lease` raises."""
        publish(path, content, only_if=self._study.renews_lease)
        self._is_unwritable = False

    def _say_cannot_be_written(self, error: OSError) -> None:
        if not self._is_unwritable:
            self._is_unwritable = True
            remedy = " for room. Free some" if error.errno in _FULL else ""
            self._say(
                f"{self._study.artifacts.folder} cannot be written ({reason_of(error)}): "
                f"checkpoints are skipped, and finished trials wait{remedy}; nothing is lost."
            )

    def _say(self, message: str, trial: int | None = None) -> None:
        with about(study=self._study.name, trial=trial):
            self._say_line(message)
