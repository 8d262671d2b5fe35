"""Predictions for requests, by the networks of a study, in a process of their own.

TensorFlow takes seconds to import, and 0.7 GB. In the server's own process it would keep
other requests waiting, and with `tuner serve` it would share the memory of the coordinators. The
process is started by the first request and ends after minutes without one.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from tuner import logs
from tuner.commands import install_command
from tuner.data.sequences import SequenceRecord
from tuner.errors import SetupError, StorageError, StudyError, TunerError
from tuner.results.prediction import Prediction, Tally, predict_records
from tuner.search.study import load
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage

if TYPE_CHECKING:
    from tuner.results.bundle import Bundle

_WAITING = 4  #: requests that are answered or wait; each holds one of the server's threads
_TURN_SECONDS = 10.0  #: that a request waits for those before it
_ANSWER_SECONDS = 120.0  #: for one request, with the import of TensorFlow and the network
_IDLE_SECONDS = 300.0  #: without a request, after which the process ends
_KEPT = 4  #: studies whose networks stay loaded
RETRY_SECONDS = 5  #: after which a client that was refused asks again

#: Of the process that predicts: one thread, and no GPU, which training processes may need.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}


class PredictorUnavailableError(TunerError):
    """No prediction now: the process is busy, or cannot do it. Another try may succeed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRequest:
    """What is to be predicted, and by which study."""

    storage: str  #: URL of the database
    artifacts: Path  #: the artifacts root
    study: str  #: its name
    records: tuple[SequenceRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionAnswer:
    """What the networks of a study say of records."""

    study: str  #: its name
    trials: tuple[int, ...]  #: whose networks predicted
    synthetic: bool  #: trained on generated sequences
    predictions: tuple[Prediction, ...]  #: in the order of the records

    @property
    def tally(self) -> Tally:
        found = Tally()
        for prediction in self.predictions:
            found.count(prediction)
        return found


class _Failure(NamedTuple):
    """Why a request was not answered."""

    message: str
    is_of_the_study: bool  #: another try has the same answer, until the study changes


#: The loaded networks, by the study's key and the names of its kept weights.
_Bundles: TypeAlias = "OrderedDict[tuple[str, ...], Bundle]"


class _Process(Protocol):
    """The process that predicts; a thread in tests."""

    def is_alive(self) -> bool: ...

    def kill(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...


Start = Callable[[Connection], _Process]


class Predictor:
    """Predicts, one request at a time."""

    def __init__(self, start: Start | None = None) -> None:
        """Starts nothing yet.

        Args:
            start: Starts `answer_requests` on a connection; as a process by default.
        """
        self._start = start or _start_process
        self._places = threading.BoundedSemaphore(_WAITING)
        self._turn = threading.Lock()
        self._process: _Process | None = None
        self._connection: Connection | None = None
        self._closed = False

    def predict(self, request: PredictionRequest) -> PredictionAnswer:
        """Predicts; waits for seconds, and for a minute at most.

        Raises:
            PredictorUnavailableError: Others are before it, or the process cannot do it now.
            StudyError: The study has no network that can predict.
        """
        if not self._places.acquire(blocking=False):
            raise PredictorUnavailableError("Too many predictions at this moment; try again soon.")
        try:
            if not self._turn.acquire(timeout=_TURN_SECONDS):
                raise PredictorUnavailableError("Another prediction takes long; try again soon.")
            try:
                answer = self._ask(request)
            finally:
                self._turn.release()
        finally:
            self._places.release()
        if isinstance(answer, PredictionAnswer):
            return answer
        if answer.is_of_the_study:
            raise StudyError(answer.message)
        raise PredictorUnavailableError(answer.message)

    def close(self) -> None:
        """Ends the process, and a prediction that it computes."""
        self._closed = True
        if self._process is not None:
            self._process.kill()  # what waits for its answer notices
        with self._turn:
            self._end()

    def _ask(self, request: PredictionRequest) -> PredictionAnswer | _Failure:
        for _ in range(2):  # it may end by itself in this very moment
            connection = self._connected()
            try:
                connection.send(request)
                if not connection.poll(_ANSWER_SECONDS):
                    self._end()
                    return _Failure(
                        f"The prediction took longer than {_ANSWER_SECONDS:.0f} s and was ended.",
                        is_of_the_study=False,
                    )
                answer: PredictionAnswer | _Failure = connection.recv()
            except (EOFError, OSError):
                self._end()
                continue
            return answer
        return _Failure(
            "The process that predicts ended (is the memory of this machine used up?).",
            is_of_the_study=False,
        )

    def _connected(self) -> Connection:
        if self._closed:
            raise PredictorUnavailableError("The server ends.")
        if self._connection is None or self._process is None or not self._process.is_alive():
            self._end()
            self._connection, theirs = multiprocessing.Pipe()
            self._process = self._start(theirs)
        return self._connection

    def _end(self) -> None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.join()


def missing_package() -> str | None:
    """Why this installation cannot predict, with the remedy; None if it can."""
    missing = [name for name in ("tensorflow", "keras") if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"This server cannot predict: {' and '.join(missing)} cannot be found. Install the extra "
        f"cpu or gpu there: `{install_command('cpu')}`."
    )


# --- in the process that predicts ---


def _start_process(connection: Connection) -> _Process:
    from tuner.cluster.processes import (  # noqa: PLC0415 - imports Dask, which pages do not need
        children_deaf_to_interrupts,
    )

    # Not forked: the server has threads, whose locks a copy would keep for ever.
    process = multiprocessing.get_context("spawn").Process(
        target=_main, args=(connection,), name="predictor", daemon=True
    )
    with children_deaf_to_interrupts():  # the server ends it
        process.start()
    connection.close()  # it has its own: with ours open, it would not notice that we are gone
    return process


def _main(connection: Connection) -> None:
    os.environ.update(_ENVIRONMENT)
    if hasattr(os, "nice"):
        os.nice(10)  # trainings and other requests come first
    logs.set_up()
    answer_requests(connection, _load_bundle)


def _load_bundle(tuned: TunedStudy) -> Bundle:
    from tuner.results.bundle_writer import bundle_of_study  # noqa: PLC0415 - imports TensorFlow

    return bundle_of_study(tuned)


def answer_requests(
    connection: Connection,
    load_bundle: Callable[[TunedStudy], Bundle],
    idle_seconds: float = _IDLE_SECONDS,
) -> None:
    """Answers until no request comes any more, or the server has ended.

    Args:
        connection: Brings `PredictionRequest`, and takes `PredictionAnswer` or the reason.
        load_bundle: Loads the networks of a study that predict.
        idle_seconds: Ends after so long without a request.
    """
    bundles: _Bundles = OrderedDict()
    with connection, contextlib.suppress(EOFError, OSError):  # the server is gone
        while connection.poll(idle_seconds):
            request: PredictionRequest = connection.recv()
            connection.send(_answer(request, bundles, load_bundle))


def _answer(
    request: PredictionRequest,
    bundles: _Bundles,
    load_bundle: Callable[[TunedStudy], Bundle],
) -> PredictionAnswer | _Failure:
    try:
        bundle = _bundle(request, bundles, load_bundle)
        return PredictionAnswer(
            study=bundle.name,
            trials=tuple(dict.fromkeys(member.trial for member in bundle.members)),
            synthetic=bundle.synthetic,
            predictions=tuple(predict_records(bundle, request.records)),
        )
    except (StorageError, SetupError) as error:
        return _Failure(str(error), is_of_the_study=False)
    except TunerError as error:
        return _Failure(str(error), is_of_the_study=True)
    except Exception as error:  # noqa: BLE001 - the next request may be answered
        what = f"prediction by study {request.study!r}: {type(error).__name__}: {error}"
        logging.getLogger(logs.OURS).error(what)
        reason = "there is no memory for it" if isinstance(error, MemoryError) else "it failed"
        return _Failure(f"No prediction: {reason}; the server's log says more.", False)


def _bundle(
    request: PredictionRequest,
    bundles: _Bundles,
    load_bundle: Callable[[TunedStudy], Bundle],
) -> Bundle:
    """What predicts for the study as of now, loaded once."""
    with Storage(request.storage, create=False) as storage:
        tuned = load(storage, request.study, artifacts_root=request.artifacts)
        # Which networks predict follows from those that were kept.
        kept = (path.name for path in tuned.artifacts.weights(0).parent.glob("*.npz"))
        key = (tuned.key, *sorted(kept))
        if key not in bundles:
            bundles[key] = load_bundle(tuned)
    bundles.move_to_end(key)
    while len(bundles) > _KEPT:
        bundles.popitem(last=False)
    return bundles[key]
