"""The one process that drives a study: it asks, reports, prunes, tells and counts the budget."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Sequence
from typing import Literal, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.curves import EpochResult, Train
from tuner.errors import StudyError, TrainingPausedError, TunerError, WorkerLostError
from tuner.objective import DETAIL_KEY, ENDED_KEY, Objective, reported_epochs
from tuner.space import ModelConfig
from tuner.storage import COORDINATOR_KEY, Decision
from tuner.study import FINISHED, RESUMED_KEY, RecordedPruner, TunedStudy

KEPT_WEIGHTS = 10  #: the best trials whose weights are kept
POISON_LOSSES = 5  #: workers a trial may lose without a new epoch
FAILURES_IN_A_ROW = 10  #: failed trials after which the study stops: something is broken
_HEARTBEAT_SECONDS = 1.0

#: Why a run ended. All but "finished" are taken up again by the same command.
Ending = Literal["finished", "stopped", "timeout", "interrupted"]

#: The trial attribute that counts workers lost since the trial's last new epoch.
_LOSSES_KEY = "workers_lost"


class Workers(Protocol):
    """What trains: a cluster, or something cheap in a test."""

    @property
    def train(self) -> Train:
        """Trains one configuration; may raise WorkerLostError or TrainingPausedError."""
        ...

    def slots(self) -> int:
        """How many trainings can run at once, now."""
        ...

    def pause(self) -> None:
        """Makes every running training end soon, with TrainingPausedError."""
        ...


class Watcher(Protocol):
    """Who shows what happens."""

    def epoch(self, trial: int, result: EpochResult) -> None: ...

    def trial_ended(self, trial: FrozenTrial) -> None: ...

    def say(self, message: str) -> None: ...

    def tick(self, running: int) -> None: ...


class Coordinator:
    """Drives one study to its budget.

    Every decision (ask with all its suggests, rung verdict, tell) is taken under one lock and
    recorded, so their order can be replayed. Threads, one per running trial, only wait for
    epochs.
    """

    def __init__(self, tuned: TunedStudy, workers: Workers, watcher: Watcher) -> None:
        self._tuned = tuned
        self._workers = workers
        self._watcher = watcher
        self._objective = Objective(tuned.record.spec, self._watched_train)
        self._deciding = threading.RLock()
        self._changed = threading.Event()  # a trial ended, or somebody asked to stop
        self._running: dict[int, int] = {}  # trial number -> completed epochs
        self._ending: Ending = "finished"
        self._stopping = False
        self._fatal: BaseException | None = None
        self._failures_in_a_row = 0
        study = tuned.study
        study.pruner = RecordedPruner(study.pruner, self._record_verdict, self._deciding)

    def stop(self, why: Ending) -> None:
        """Ends the run soon: running trials save a checkpoint and stay open."""
        if not self._stopping:
            self._ending = why
            self._stopping = True
            self._changed.set()

    def run(self, *, timeout: float | None = None) -> Ending:
        """Runs trials until the budget is finished or somebody stops the study.

        Args:
            timeout: Seconds after which the study is stopped (not finished).

        Raises:
            StorageError: Another coordinator runs this study.
            LeaseLostError: Another coordinator took over.
            StudyError: Ten trials in a row failed (the message has the last reason), or the test
                split of this study was opened.
            TunerError: The workers are unusable.
        """
        self._tuned.storage.take_lease(self._tuned.id)
        self._refuse_a_reported_study()
        deadline = None if timeout is None else time.monotonic() + timeout
        told_to_pause = False
        try:
            while True:
                if deadline is not None and time.monotonic() > deadline:
                    self.stop("timeout")
                if self._stopping and not told_to_pause:
                    self._workers.pause()
                    told_to_pause = True
                if not self._stopping:
                    self._start_trials()
                if not self._running:
                    break
                self._changed.wait(_HEARTBEAT_SECONDS)
                self._changed.clear()
                if self._tuned.storage.heartbeat():
                    self.stop("stopped")
                self._watcher.tick(len(self._running))
        except BaseException:
            self.stop("interrupted")
            self._workers.pause()
            raise
        finally:
            # While a trial's thread lives, the fence must stand: it may still try to write.
            if not self._running:
                self._tuned.storage.release_lease()
        if self._fatal is not None:
            raise self._fatal
        return self._ending

    def _refuse_a_reported_study(self) -> None:
        if self._tuned.storage.ledger(study_key=self._tuned.key):
            self._tuned.storage.release_lease()
            raise StudyError(
                f"The test split of study {self._tuned.name!r} was opened by its report, so it "
                "trains no more trials. Start a new study (--name) with another split seed."
            )

    def _start_trials(self) -> None:
        while len(self._running) < self._workers.slots():
            trial = self._claim()
            if trial is None:
                return
            name = f"trial-{trial.number}"
            threading.Thread(target=self._drive, args=(trial,), name=name, daemon=True).start()

    def _claim(self) -> optuna.Trial | None:
        """The next trial to run; None where finished and running ones make up the budget."""
        with self._deciding:
            trials = self._tuned.trials()
            finished = sum(trial.state in FINISHED for trial in trials)
            if finished + len(self._running) >= self._tuned.budget:
                return None
            # Trials of a coordinator that died go first; trials of others are left alone.
            for trial in trials:
                ours = COORDINATOR_KEY in trial.user_attrs
                if trial.state == TrialState.RUNNING and ours and trial.number not in self._running:
                    return self._adopt(trial)
            asked = self._tuned.study.ask()
            self._tuned.record.spec.space.suggest(asked)
            if COORDINATOR_KEY not in asked.user_attrs:  # enqueued by the user
                asked.set_user_attr(COORDINATOR_KEY, "enqueued")
            self._record(Decision(trial=asked.number, kind="ask", epoch=None, verdict=None,
                                  seen=dict(self._running)))  # fmt: skip
            self._running[asked.number] = 0
            return asked

    def _adopt(self, trial: FrozenTrial) -> optuna.Trial:
        resumed = optuna.Trial(self._tuned.study, trial._trial_id)
        self._count_resumption(resumed)
        self._running[trial.number] = trial.last_step or 0
        self._watcher.say(f"Trial {trial.number} goes on; it had {trial.last_step or 0} epochs.")
        return resumed

    def _drive(self, trial: optuna.Trial) -> None:
        """One trial from its claim to its end, on a thread of its own."""
        try:
            self._tell(trial, *self._outcome(trial))
        except TrainingPausedError:
            pass  # stays RUNNING, with a checkpoint, for whoever resumes the study
        except BaseException as error:  # noqa: BLE001 - a thread's error must reach `run`
            self._fatal = self._fatal or error
            self.stop("stopped")
        finally:
            with self._deciding:
                self._running.pop(trial.number, None)
            self._changed.set()

    def _outcome(self, trial: optuna.Trial) -> tuple[TrialState, float | None]:
        while True:
            before = reported_epochs(trial)
            try:
                return TrialState.COMPLETE, self._objective(trial)
            except optuna.TrialPruned:
                return TrialState.PRUNED, None
            except WorkerLostError as lost:
                if self._stopping:  # we took the workers away ourselves: no fault of the trial
                    raise TrainingPausedError from lost
                if self._is_poison(trial, progressed=reported_epochs(trial) > before):
                    return TrialState.PRUNED, None
                self._count_resumption(trial)
                self._watcher.say(f"Trial {trial.number}: {lost}; it goes on under its number.")
            except (TunerError, TrainingPausedError):
                raise
            except Exception as error:
                if self._stopping:
                    raise TrainingPausedError from error
                trial.set_user_attr(DETAIL_KEY, f"{type(error).__name__}: {error}")
                return TrialState.FAIL, None

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float | None) -> None:
        with self._deciding:
            told = self._tuned.study.tell(trial, value, state)
            self._record(Decision(trial=trial.number, kind="tell", epoch=told.last_step,
                                  verdict=told.state.name, seen=None))  # fmt: skip
        artifacts = self._tuned.artifacts
        artifacts.checkpoint(trial.number).unlink(missing_ok=True)
        if state == TrialState.COMPLETE:
            with self._deciding:
                best = {kept.number for kept in self._tuned.ranked()[:KEPT_WEIGHTS]}
                artifacts.keep_weights(best | set(self._running))
        self._watcher.trial_ended(told)
        self._count_failures(told)

    def _count_failures(self, told: FrozenTrial) -> None:
        with self._deciding:
            failed = told.state == TrialState.FAIL
            self._failures_in_a_row = self._failures_in_a_row + 1 if failed else 0
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                raise StudyError(
                    f"{FAILURES_IN_A_ROW} trials in a row failed, so the study stops; the last "
                    f"reason, of trial {told.number}: {told.user_attrs.get(DETAIL_KEY)}. "
                    "Mend that and launch again: nothing that finished is lost."
                )

    def _is_poison(self, trial: optuna.Trial, *, progressed: bool) -> bool:
        """Counts a lost worker; True once this trial has cost too many."""
        losses = 1 if progressed else int(trial.user_attrs.get(_LOSSES_KEY, 0)) + 1
        trial.set_user_attr(_LOSSES_KEY, losses)
        if losses < POISON_LOSSES:
            return False
        trial.set_user_attr(ENDED_KEY, "worker_lost")
        trial.set_user_attr(DETAIL_KEY, f"{losses} workers died of it without a new epoch")
        trial.set_constraint(ENDED_KEY, 1.0)
        return True

    def _count_resumption(self, trial: optuna.Trial) -> None:
        trial.set_user_attr(RESUMED_KEY, int(trial.user_attrs.get(RESUMED_KEY, 0)) + 1)

    def _watched_train(
        self, config: ModelConfig, *, seed: int, trial: int, rungs: Sequence[int]
    ) -> Generator[EpochResult, None, None]:
        epochs = self._workers.train(config, seed=seed, trial=trial, rungs=rungs)
        with contextlib.closing(epochs):
            for result in epochs:
                self._running[trial] = max(self._running[trial], result.epoch)
                self._watcher.epoch(trial, result)
                yield result

    def _record_verdict(self, trial: FrozenTrial, prunes: bool) -> None:
        self._record(
            Decision(
                trial=trial.number,
                kind="rung",
                epoch=trial.last_step,
                verdict="prune" if prunes else "go",
                seen=dict(self._running),
            )
        )

    def _record(self, decision: Decision) -> None:
        self._tuned.storage.record_decision(self._tuned.id, decision)
