"""The service: drives every queued study over one cluster, several at once with fair shares.

The queue is a table of the storage, so it outlives the service: what a service that died was
driving, the next one resumes. Leases decide who drives a study, so a second service on the
same storage does no harm.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from tuner.coordination.coordinator import Coordinator, Ending
from tuner.coordination.queue import queue
from tuner.coordination.roles import Workers
from tuner.coordination.shares import FairShares
from tuner.coordination.webhook import Notifier, webhook_of
from tuner.coordination.words import describe_end, duration
from tuner.errors import (
    ClusterError,
    LeaseLostError,
    StorageError,
    StudyError,
    StudyInUseError,
    TunerError,
    counted,
)
from tuner.logs import about
from tuner.search.attributes import ENDED_KEY, ERROR_KEY
from tuner.search.confirmation import plan_confirmation
from tuner.search.development import study_development
from tuner.search.status import status
from tuner.search.study import load
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import NotifyEvent
from tuner.storage.lease import Lease
from tuner.storage.storage import Storage
from tuner.train import EpochResult

_LOOK_SECONDS = 1.0  #: between two looks at the queue
_NAP_SECONDS = 0.1  #: a signal is noticed after this long
_RETRY_SECONDS = (2.0, 60.0)  #: after a first failure, and at most; doubled in between
_PATIENCE_AFTER_STOP_SECONDS = 8.0  #: with a database that is away, once the service is to stop
_PAUSE_SECONDS = 70.0  #: for trainings of a study that failed to end; workers give up after 60

#: Opens the workers for one study: the study, and the file with its development rows.
OpenWorkers = Callable[[TunedStudy, Path], AbstractContextManager[Workers]]
Say = Callable[[str], None]


class LogWatcher:
    """Says what an engineer looks for in a log: no epochs, no ordinary trials."""

    def __init__(self, study: str, say: Say) -> None:
        self._study = study
        self._say = say

    def epoch(self, trial: int, result: EpochResult) -> None:
        pass

    def trial_ended(self, trial: FrozenTrial) -> None:
        if trial.state == TrialState.FAIL or trial.user_attrs.get(ENDED_KEY):
            with about(trial=trial.number):
                self.say(describe_end(trial))

    def say(self, message: str) -> None:
        with about(study=self._study):
            self._say(f"Study {self._study}: {message}")

    def tick(self, running: int) -> None:
        pass


@dataclass(slots=True, kw_only=True)
class _Drive:
    """One study that this service drives, or tries to."""

    study_id: int  #: Optuna's
    name: str  #: the study's, once the database has told it
    thread: threading.Thread | None = None  #: that drives it, once it is started
    storage: Storage | None = None  #: the thread's own, which may wait without end
    coordinator: Coordinator | None = None  #: once the workers are open
    stopping: Ending | None = None  #: what the coordinator was told, or is to be told at once


@dataclass(slots=True, kw_only=True)
class _Setback:
    """A study that could not be driven, and is tried again."""

    pause: float  #: seconds between the last two tries
    not_before: float  #: monotonic seconds


class Service:
    """Drives every study in the queue of a storage until it is stopped."""

    def __init__(
        self,
        *,
        open_storage: Callable[[], Storage],
        open_workers: OpenWorkers,
        slots: Callable[[], int],
        artifacts_root: Path,
        say: Say,
        notifier: Notifier | None = None,
    ) -> None:
        """Makes a service that has not begun yet.

        Args:
            open_storage: Opens the database once more: each study has a connection of its own,
                whose writes its own lease fences. It should wait for a database that is away.
            open_workers: Opens the cluster's workers for one study.
            slots: How many trainings the cluster runs at once, now.
            artifacts_root: Where checkpoints, weights and development rows are kept.
            say: Takes a line for the log.
            notifier: Notifies the studies' webhooks.
        """
        self._open_storage = open_storage
        self._open_workers = open_workers
        self._slots = slots
        self._artifacts_root = artifacts_root
        self._say = say
        self._shares = FairShares()
        self._notifier = notifier or Notifier(say)
        self._stopping = False
        self._lock = threading.Lock()  # of the drives' coordinators and stops
        self._drives: dict[int, _Drive] = {}
        self._setbacks: dict[int, _Setback] = {}
        self._said: dict[int, set[str]] = {}  # of each study: a reason is not repeated

    def stop(self) -> None:
        """Ends `run` soon: studies save checkpoints and stay queued. Safe in a signal handler."""
        self._stopping = True

    def run(self, storage: Storage) -> None:
        """Drives studies until `stop`.

        Args:
            storage: For looking at the queue. It should give up on a database that is away after
                seconds, so that a signal is heard meanwhile; it is asked again and again.
        """
        with self._notifier:
            self._run_until_stopped(storage)

    def _run_until_stopped(self, storage: Storage) -> None:
        away = False
        told_slots: int | None = None
        try:
            while not self._stopping:
                try:
                    self._look(storage)
                    if away:
                        self._say("The queue can be read again.")
                    away = False
                except StorageError as error:
                    if not away:
                        self._say(f"The queue cannot be read, so no study is started: {error}")
                    away = True
                if (slots := self._slots()) != told_slots:
                    told_slots = slots
                    self._say(_slots_in_words(slots))
                self._nap()
        finally:
            self._stop_all(storage)

    def _nap(self) -> None:
        # Short naps, and no event that a signal handler sets: it could interrupt this very
        # thread while it holds the event's lock.
        until = time.monotonic() + _LOOK_SECONDS
        while not self._stopping and time.monotonic() < until:
            time.sleep(_NAP_SECONDS)

    def _look(self, storage: Storage) -> None:
        queued = storage.queue.study_ids()
        for study_id, drive in list(self._drives.items()):
            if drive.thread is not None and not drive.thread.is_alive():
                del self._drives[study_id]
            elif study_id not in queued:
                self._stop(drive, "stopped")
        for known in (self._setbacks, self._said):
            for study_id in set(known) - set(queued) - set(self._drives):
                known.pop(study_id)
        for study_id in queued:
            if study_id not in self._drives and self._may_try(storage, study_id):
                self._begin(study_id)

    def _may_try(self, storage: Storage, study_id: int) -> bool:
        setback = self._setbacks.get(study_id)
        if setback is not None and time.monotonic() < setback.not_before:
            return False
        lease = storage.leases.of(study_id)
        if lease is not None and lease.is_live:
            self._say_once(study_id, _waiting_for(storage, study_id, lease))
            return False
        return True

    def _begin(self, study_id: int) -> None:
        drive = _Drive(study_id=study_id, name=f"number {study_id}")
        self._drives[study_id] = drive
        drive.thread = threading.Thread(
            target=self._drive, args=(drive,), name=f"study-{study_id}", daemon=True
        )
        drive.thread.start()

    def _stop(self, drive: _Drive, why: Ending) -> None:
        with self._lock:
            if drive.stopping is None:
                drive.stopping = why
                if drive.coordinator is not None:
                    drive.coordinator.stop(why)

    def _stop_all(self, storage: Storage) -> None:
        drives = [one for one in self._drives.values() if one.thread and one.thread.is_alive()]
        if drives:
            self._say(f"Stopping {_studies(len(drives))}: running trials save a checkpoint.")
        for drive in drives:
            self._stop(drive, "interrupted")
        answered_at = time.monotonic()
        while drives := [one for one in drives if one.thread and one.thread.is_alive()]:
            for drive in drives:
                if drive.thread is not None:
                    drive.thread.join(_NAP_SECONDS)  # so that a second signal is heard
            try:
                storage.queue.study_ids()
                answered_at = time.monotonic()
            except StorageError:
                if time.monotonic() - answered_at > _PATIENCE_AFTER_STOP_SECONDS:
                    self._give_up_the_database(drives)
        self._say("The service ended; queued studies wait for the next one.")

    def _give_up_the_database(self, drives: Sequence[_Drive]) -> None:
        with self._lock:
            waiting = [one.storage for one in drives if one.storage is not None]
            for drive in drives:
                drive.storage = None
        if waiting:
            self._say(
                "The database is unavailable, so studies stop without it; nothing it holds is lost."
            )
        for storage in waiting:
            storage.give_up()

    # --- one study, on a thread of its own ---

    def _drive(self, drive: _Drive) -> None:
        with contextlib.ExitStack() as subject:
            self._drive_about(drive, subject)

    def _drive_about(self, drive: _Drive, subject: contextlib.ExitStack) -> None:
        study_id = drive.study_id
        try:
            with self._open_storage() as storage:
                with self._lock:
                    drive.storage = storage
                try:
                    drive.name = storage.optuna.get_study_name_from_id(study_id)
                    subject.enter_context(about(study=drive.name))
                except KeyError:  # deleted a moment ago
                    storage.queue.remove(study_id)
                    return
                try:
                    self._run(storage, drive)
                except StudyError as error:
                    self._give_up(storage, drive, str(error))
                except (StorageError, ClusterError, LeaseLostError, OSError):
                    raise
                except Exception as error:  # noqa: BLE001 - one study must not end the others
                    self._give_up(storage, drive, f"{type(error).__name__}: {error}")
                else:
                    self._setbacks.pop(study_id, None)
        except StudyInUseError:
            self._try_later(drive, None)  # the next look says by whom
        except Exception as error:  # noqa: BLE001 - the database, the workers: worth another try
            self._try_later(drive, error)

    def _run(self, storage: Storage, drive: _Drive) -> None:
        tuned = load(storage, drive.name, artifacts_root=self._artifacts_root)
        began = time.monotonic()
        with self._open_workers(tuned, study_development(tuned)) as workers:
            share = self._shares.join(workers)
            coordinator = Coordinator(tuned, share, LogWatcher(drive.name, self._say))
            share.used_by(coordinator)
            try:
                with self._lock:
                    drive.coordinator = coordinator
                    if drive.stopping is not None:
                        return
                unfinished = coordinator.unfinished()
                self._say_once(
                    drive.study_id,
                    f"Study {drive.name}: started, {unfinished} of "
                    f"{counted(tuned.budget, 'trial')} to go.",
                )
                ending = coordinator.run()
            finally:
                _wait_for_trainings(coordinator)
                share.leave()
                if not coordinator.running:
                    storage.lease.release()  # where it failed and still holds it
        self._said.pop(drive.study_id, None)
        self._conclude(tuned, ending, time.monotonic() - began)

    def _conclude(self, tuned: TunedStudy, ending: Ending, seconds: float) -> None:
        if ending != "finished":
            if ending == "stopped":
                again = tuned.command("launch", "STUDY.toml", "--detach")
                self._say(f"Study {tuned.name}: stopped; `{again}` resumes it.")
                self._notify(tuned, "stopped")
            return
        tuned.storage.queue.remove(tuned.id)
        now = status(tuned)
        if now.finished_trials < now.budget:  # its budget was raised at this moment
            tuned.storage.queue.add(tuned.id)
            return
        best = "none" if now.best is None else f"{now.best.value:.4f} (trial {now.best.number})"
        self._say(
            f"Study {tuned.name}: finished, {now.finished_trials} of "
            f"{counted(now.budget, 'trial')} ({now.trials_in_words}), best validation loss {best}, "
            f"{duration(seconds)} in this service."
        )
        self._notify(tuned, "finished")
        self._confirm(tuned)

    def _confirm(self, tuned: TunedStudy) -> None:
        """Queues the confirmation that a study's file asks for."""
        if tuned.confirm is None:
            return
        found = plan_confirmation(tuned, top=tuned.confirm.top, seeds=tuned.confirm.seeds)
        if not found.is_complete:
            queue(found.tuned)
            trainings = counted(found.trainings, "training")
            self._say(f"Study {tuned.name}: {found.tuned.name} is queued, {trainings}.")

    def _give_up(self, storage: Storage, drive: _Drive, reason: str) -> None:
        """Takes a study out of the queue that would fail again, and writes down why."""
        storage.optuna.set_study_user_attr(drive.study_id, ERROR_KEY, reason)
        storage.queue.remove(drive.study_id)
        self._say(f"Study {drive.name}: given up, it left the queue. {reason}")
        with contextlib.suppress(TunerError):  # it cannot be loaded
            tuned = load(storage, drive.name, artifacts_root=self._artifacts_root)
            self._notify(tuned, "failed", reason)

    def _notify(self, tuned: TunedStudy, event: NotifyEvent, reason: str = "") -> None:
        try:
            webhook = webhook_of(tuned.notify, say=self._say)
        except TunerError as error:  # a URL that cannot be used
            self._say(f"Study {tuned.name}: no notification is sent. {error}")
        else:
            self._notifier.notify(tuned, webhook, event, reason)

    def _try_later(self, drive: _Drive, error: Exception | None) -> None:
        before = self._setbacks.get(drive.study_id)
        first, longest = _RETRY_SECONDS
        pause = first if before is None else min(2 * before.pause, longest)
        self._setbacks[drive.study_id] = _Setback(pause=pause, not_before=time.monotonic() + pause)
        if error is not None:
            self._say_once(
                drive.study_id, f"Study {drive.name}: interrupted, it is tried again. {error}"
            )

    def _say_once(self, study_id: int, message: str) -> None:
        if message not in self._said.setdefault(study_id, set()):
            self._said[study_id].add(message)
            self._say(message)


def _waiting_for(storage: Storage, study_id: int, lease: Lease) -> str:
    name = storage.optuna.get_study_name_from_id(study_id)
    return (
        f"Study {name}: is driven by process {lease.holder.pid} on {lease.holder.host}; "
        "this service resumes it if that one dies."
    )


def _wait_for_trainings(coordinator: Coordinator) -> None:
    """A coordinator that failed leaves trainings behind: their slots are not free yet."""
    until = time.monotonic() + _PAUSE_SECONDS
    while coordinator.running and time.monotonic() < until:
        time.sleep(_NAP_SECONDS)


def _slots_in_words(slots: int) -> str:
    if slots == 0:
        return "No worker offers a slot: studies wait for one."
    return f"The cluster runs {counted(slots, 'training')} at once."


def _studies(count: int) -> str:
    return counted(count, "study", "studies")
