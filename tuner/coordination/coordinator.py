"""The one process that drives a study: it asks, reports, prunes, tells and counts the budget.

Why: `docs/decisions.md#why-does-one-process-decide-while-many-train`.
"""

from __future__ import annotations

import threading
import time
from typing import Literal

from tuner.coordination.decisions import Decisions
from tuner.coordination.lease import LeaseKeeper
from tuner.coordination.roles import Watcher, Workers
from tuner.coordination.running_trial import RunningTrial
from tuner.coordination.study_note import StudyNote
from tuner.errors import TrainingPausedError, TunerError
from tuner.search.study import refuse_a_reported_study, take_settings
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import StudySpec

_TURN_SECONDS = 1.0  #: the longest that a turn of the loop waits for something to happen

#: Why a run ended. All but "finished" are resumed by the same command.
Ending = Literal["finished", "stopped", "timeout", "interrupted"]


class Coordinator:
    """Drives one study to its budget.

    `run` keeps the lease, starts a thread for each free slot, and never waits for the database.
    A thread runs one trial (`RunningTrial`), waits for its epochs, and takes what is to be decided
    to `Decisions`.
    """

    def __init__(self, tuned: TunedStudy, workers: Workers, watcher: Watcher) -> None:
        self._tuned = tuned
        self._workers = workers
        self._watcher = watcher
        self._lease = LeaseKeeper(tuned.storage)
        self._note = StudyNote(tuned)
        self._decisions = Decisions(
            tuned, has_fast_bfloat16=workers.has_fast_bfloat16, say=watcher.say
        )
        self._slots = 0  # as the workers last said
        self._threads = 0  # that have a trial, or are about to have one
        self._counting = threading.Lock()  # of the threads
        self._changed = threading.Event()  # a trial ended, or somebody asked to stop
        self._stopped: Ending | None = None  # why, once somebody asked to stop
        self._fatal: BaseException | None = None  # the first error of a thread

    @property
    def running(self) -> int:
        """Trials in flight, or about to be."""
        return self._threads

    def unfinished(self) -> int:
        """Trials that the budget still asks for, those in flight included."""
        return self._decisions.unfinished()

    def wake(self) -> None:
        """Makes the run look for free slots now, and not at its next heartbeat."""
        self._changed.set()

    def stop(self, why: Ending) -> None:
        """Ends the run soon: running trials save a checkpoint and stay open."""
        if self._stopped is None:
            self._stopped = why
            self._lease.stop()
            self._decisions.close()
            self._changed.set()

    def run(self, *, asked: StudySpec | None = None, timeout: float | None = None) -> Ending:
        """Runs trials until the budget is finished or somebody stops the study.

        Args:
            asked: The study file with the budget and the stop rule that a launch asks for; what
                stands in the study by default.
            timeout: Seconds after which the study is stopped (not finished).

        Raises:
            StorageError: Another coordinator runs this study.
            LeaseLostError: Another coordinator took over.
            StudyError: Ten trials in a row failed (the message has the last reason), or the test
                split of this study was opened.
            TunerError: The workers are unusable.
        """
        self._begin(asked)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while self._stopped is None and self._has_work():
                if deadline is not None and time.monotonic() > deadline:
                    self.stop("timeout")
                self._turn()
            if self._stopped is not None:
                self._workers.pause()
            while self.running:
                self._turn()
            self._note.begin("finished" if self._stopped is None else "stopped")
        except BaseException:
            self.stop("interrupted")
            self._workers.pause()
            raise
        finally:
            # While a trial's thread lives, the fence must stand: it may still try to write.
            if not self.running:
                self._lease.release(has_failed=self._fatal is not None)
        if self._fatal is not None:
            raise self._fatal
        return self._stopped or "finished"

    def _begin(self, asked: StudySpec | None) -> None:
        """Takes the lease and the settings, and what an earlier coordinator left."""
        self._tuned.storage.lease.take(self._tuned.id)
        try:
            refuse_a_reported_study(self._tuned)
            if asked is not None:
                take_settings(self._tuned, asked)
        except TunerError:
            self._tuned.storage.lease.release()
            raise
        self._tuned.artifacts.tidy(
            {trial.number for trial in self._tuned.trials() if not trial.state.is_finished()}
        )
        self._decisions.begin()

    def _turn(self) -> None:
        """Waits until something happened, and does what is due."""
        self._changed.wait(_TURN_SECONDS)
        self._changed.clear()
        if self._lease.beat():
            self.stop("stopped")
        self._note.refresh()
        self._watcher.tick(self._decisions.claimed)

    def _has_work(self) -> bool:
        """Starts a thread for each free slot; whether there is anything to wait for."""
        until = time.monotonic() + _TURN_SECONDS
        while self._stopped is None:
            if time.monotonic() > until:  # trials end as fast as they start
                self._changed.set()
                break
            self._slots = self._workers.slots()
            # `running` first: a trial that ends in between must not be missing in both.
            if self.running >= min(self._slots, self.unfinished()):
                break
            with self._counting:
                self._threads += 1
            threading.Thread(target=self._work, name="trial", daemon=True).start()
        self._note.tell_workers(max(self._slots, self.running))
        # Without a slot there is nothing in flight, but a budget to wait for.
        return self.running > 0 or self.unfinished() > 0

    def _work(self) -> None:
        """One trial, on a thread of its own; only those may wait for the database."""
        trial = None
        try:
            trial = self._decisions.claim()
            if trial is not None:
                RunningTrial(
                    trial,
                    tuned=self._tuned,
                    workers=self._workers,
                    watcher=self._watcher,
                    decisions=self._decisions,
                    is_stopping=lambda: self._stopped is not None,
                ).run()
        except TrainingPausedError:
            pass  # stays RUNNING, with a checkpoint, for whoever resumes the study
        except BaseException as error:  # noqa: BLE001 - a thread's error must reach `run`
            self._fatal = self._fatal or error
            self.stop("stopped")
        finally:
            if trial is not None:
                self._decisions.release(trial.number)
            with self._counting:
                self._threads -= 1
            self._changed.set()
