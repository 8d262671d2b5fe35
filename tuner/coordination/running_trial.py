"""One trial from its claim to its end, on a thread of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import optuna
from optuna.trial import TrialState

from tuner.coordination.decisions import Decisions, count_resumption
from tuner.coordination.losses import Losses
from tuner.coordination.roles import Watcher, Workers
from tuner.coordination.trial_page import TrialPage
from tuner.errors import TrainingPausedError, TunerError, WorkerLostError
from tuner.logs import about
from tuner.search.attributes import DETAIL_KEY, ENDED_KEY
from tuner.search.objective import Objective, reported_epochs
from tuner.search.tuned_study import TunedStudy
from tuner.train import EpochResult, TrainingJob


class RunningTrial:
    """Has a trial trained, on another worker whenever one is lost, and tells how it ended."""

    def __init__(
        self,
        trial: optuna.Trial,
        *,
        tuned: TunedStudy,
        workers: Workers,
        watcher: Watcher,
        decisions: Decisions,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._trial = trial
        self._tuned = tuned
        self._workers = workers
        self._watcher = watcher
        self._decisions = decisions
        self._is_stopping = is_stopping
        self._objective = Objective(tuned.record.spec, self._train, precision_of=tuned.precision_of)
        self._page: TrialPage | None = None  # from the first training on

    def run(self) -> None:
        """Runs it to its end.

        Raises:
            TrainingPausedError: The study is stopped; the trial stays open, with a checkpoint.
            StudyError: Too many trials in a row failed.
            TunerError: The workers are unusable, or another coordinator took over.
        """
        # What will be trained must stand in the database before a checkpoint of it can.
        self._tuned.storage.flush()
        self._end(*self._outcome())

    def _outcome(self) -> tuple[TrialState, float | None]:
        trial = self._trial
        while True:
            before = reported_epochs(trial)
            try:
                return TrialState.COMPLETE, self._objective(trial)
            except optuna.TrialPruned:
                return TrialState.PRUNED, None
            except WorkerLostError as lost:
                if self._is_stopping():  # we took the workers away: no fault of the trial
                    raise TrainingPausedError from lost
                losses = Losses.of(trial.user_attrs).after(
                    lost, progressed=reported_epochs(trial) > before
                )
                self._note_losses(losses)
                if losses.is_poison:
                    return TrialState.PRUNED, None
                count_resumption(trial)
                with about(trial=trial.number):
                    self._watcher.say(f"Trial {trial.number}: {lost}; it resumes under its number.")
            except (TunerError, TrainingPausedError):
                raise
            except Exception as error:
                if self._is_stopping():
                    raise TrainingPausedError from error
                trial.set_user_attr(DETAIL_KEY, f"{type(error).__name__}: {error}")
                return TrialState.FAIL, None

    def _train(self, job: TrainingJob) -> Generator[EpochResult, None, None]:
        """The epochs of the workers, shown as they come."""
        if self._page is None:
            self._page = TrialPage(self._tuned, self._trial, job.config)
            self._page.begin()
        with contextlib.closing(self._workers.train(job)) as epochs:
            for result in epochs:
                self._watcher.epoch(job.trial, result)
                self._page.epoch(result, may_draw=self._tuned.storage.lease.is_certain)
                yield result

    def _note_losses(self, losses: Losses) -> None:
        trial = self._trial
        for key, count in losses.attributes().items():
            if trial.user_attrs.get(key) != count:
                trial.set_user_attr(key, count)
        if losses.is_poison:
            trial.set_user_attr(ENDED_KEY, "worker_lost")
            trial.set_user_attr(DETAIL_KEY, f"{losses.most} workers died of it without a new epoch")
            trial.set_constraint(ENDED_KEY, 1.0)

    def _end(self, state: TrialState, value: float | None) -> None:
        storage = self._tuned.storage
        said: dict[str, str] = {}
        if self._page is not None:
            said = self._page.end(state, may_draw=storage.lease.ensure)
        told = self._decisions.tell(self._trial, state, value, said)
        # Who was frozen since, and replaced, would remove what the next coordinator needs.
        storage.lease.ensure()
        self._tuned.artifacts.drop_checkpoint(told.number)
        if state == TrialState.COMPLETE:
            self._decisions.keep_best_weights()
        self._watcher.trial_ended(told)
        self._decisions.count(told)
