"""The one process that drives a study: it asks, reports, prunes, tells and counts the budget."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import Literal, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.coordination.lease import LeaseKeeper
from tuner.coordination.losses import FAILURES_IN_A_ROW, Failures, Losses
from tuner.coordination.study_note import begin_overview
from tuner.coordination.trial_page import TrialPage
from tuner.errors import (
    StudyError,
    TrainingPausedError,
    TunerError,
    WorkerLostError,
    counted,
)
from tuner.every import Every
from tuner.logs import about
from tuner.search.attributes import (
    DETAIL_KEY,
    ENDED_KEY,
    RESUMED_KEY,
    WORKERS_KEY,
)
from tuner.search.hyperband import RecordedPruner
from tuner.search.objective import Objective, reported_epochs
from tuner.search.status import State
from tuner.search.stop_rule import StopRule
from tuner.search.study import refuse_a_reported_study, take_settings
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.spec.spec import StudySpec
from tuner.storage.decisions import Decision
from tuner.storage.lease import COORDINATOR_KEY
from tuner.train import EpochResult, Train, TrainingJob

KEPT_WEIGHTS = 10  #: the best trials whose weights are kept
_TURN_SECONDS = 1.0  #: the longest that a turn of the loop waits for something to happen
_WORKERS_SECONDS = 5.0  #: at most this often the number of workers is written down
_OVERVIEW_SECONDS = 5.0  #: at least this long between two overviews of the study

#: Why a run ended. All but "finished" are taken up again by the same command.
Ending = Literal["finished", "stopped", "timeout", "interrupted"]


class Workers(Protocol):
    """What trains: a cluster, or something cheap in a test."""

    @property
    def train(self) -> Train:
        """Trains a job; may raise WorkerLostError or TrainingPausedError."""
        ...

    def slots(self) -> int:
        """How many trainings can run at once, now."""
        ...

    def has_fast_bfloat16(self) -> bool:
        """Whether all who train multiply bfloat16 in hardware, as of now."""
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
        self._objective = Objective(
            tuned.record.spec, self._watched_train, precision_of=tuned.precision_of
        )
        self._deciding = threading.RLock()  # its holder may wait for the database
        self._counting = threading.Lock()  # of the two below; `run` takes this one alone
        self._changed = threading.Event()  # a trial ended, or somebody asked to stop
        self._claiming = 0  # threads that are about to have a trial
        self._running: dict[int, int] = {}  # trial number -> completed epochs
        self._ending: Ending = "finished"
        self._stopping = False
        self._is_told_to_pause = False
        self._fatal: BaseException | None = None
        self._failures = Failures()
        self._stop_rule: StopRule | None = None
        self._progress = _Progress()
        self._claimed: dict[int, optuna.Trial] = {}  # by number: what a thread drives
        self._pages: dict[int, TrialPage] = {}  # by number, from the first training on
        self._overview: Future[None] | None = None
        self._overview_pause = Every(_OVERVIEW_SECONDS)
        self._slots = 0  # as the workers last said
        self._is_precision_decided = False
        self._told_workers: int | None = None
        self._told_workers_pause = Every(_WORKERS_SECONDS)
        self._lease = LeaseKeeper(tuned.storage)

    @property
    def running(self) -> int:
        """Trials in flight, or about to be."""
        return len(self._running) + self._claiming

    def unfinished(self) -> int:
        """Trials that the budget still asks for, those in flight included."""
        finished, _ = self._progress.look(self._tuned.trials())
        return max(0, self._tuned.budget - finished)

    def wake(self) -> None:
        """Makes the run look for free slots now, and not at its next heartbeat."""
        self._changed.set()

    def stop(self, why: Ending) -> None:
        """Ends the run soon: running trials save a checkpoint and stay open."""
        if not self._stopping:
            self._ending = why
            self._lease.stop()
            self._stopping = True
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
            while self._has_work():
                if deadline is not None and time.monotonic() > deadline:
                    self.stop("timeout")
                self._changed.wait(_TURN_SECONDS)
                self._changed.clear()
                if self._lease.beat():
                    self.stop("stopped")
                self._refresh_overview()
                self._watcher.tick(len(self._running))
            self._begin_overview("finished" if self._ending == "finished" else "stopped")
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
        return self._ending

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
        self._decide_as_recorded()
        if (settings := self._tuned.stop) is not None:
            self._stop_rule = StopRule(settings, self._tuned.trials(*FINISHED))

    def _has_work(self) -> bool:
        """Starts what can be started, or ends what runs; whether anything is left to wait for."""
        if self._stopping:
            if not self._is_told_to_pause:
                self._is_told_to_pause = True
                self._workers.pause()
            return self.running > 0
        self._start_trials()
        self._note_workers()
        # Without a slot there is nothing in flight, but a budget to wait for.
        return self.running > 0 or self.unfinished() > 0

    def _refresh_overview(self) -> None:
        """Brings the study's page up to date now and then, for 2 % of the time at most."""
        is_written = self._overview is None or self._overview.done()
        if is_written and self._overview_pause.is_due():
            began = time.monotonic()
            self._begin_overview("running")
            self._overview_pause.begin_pause(at_least=50 * (time.monotonic() - began))

    def _begin_overview(self, state: State) -> None:
        self._overview = begin_overview(self._tuned, state)

    def _decide_as_recorded(self) -> None:
        """Lets rungs that were decided before, by a coordinator that died, stay as decided."""
        recorded = {
            (decision.trial, decision.epoch): decision.verdict == "prune"
            for decision in self._tuned.storage.decisions.of(self._tuned.id)
            if decision.kind == "rung"
        }
        study = self._tuned.study
        pruner = study.pruner.inner if isinstance(study.pruner, RecordedPruner) else study.pruner
        study.pruner = RecordedPruner(pruner, recorded, self._record_verdict, self._together)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """One decision at a time; what it writes is committed whole, or not at all."""
        with self._deciding, self._tuned.storage.together():
            yield

    def _start_trials(self) -> None:
        """Starts a thread for each free slot; only those may wait for the database."""
        until = time.monotonic() + _TURN_SECONDS
        while not self._stopping:
            if time.monotonic() > until:  # trials end as fast as they start
                self._changed.set()
                return
            with self._counting:
                if self.running >= self.unfinished():
                    return
                self._slots = self._workers.slots()
                if self.running >= self._slots:
                    return
                self._claiming += 1
            threading.Thread(target=self._work, name="trial", daemon=True).start()

    def _work(self) -> None:
        """One trial from its claim to its end, on a thread of its own."""
        trial = None
        try:
            try:
                trial = self._claim()
            finally:
                with self._counting:
                    self._claiming -= 1
            if trial is not None:
                self._drive(trial)
        except TrainingPausedError:
            pass  # stays RUNNING, with a checkpoint, for whoever resumes the study
        except BaseException as error:  # noqa: BLE001 - a thread's error must reach `run`
            self._fatal = self._fatal or error
            self.stop("stopped")
        finally:
            if trial is not None:
                with self._counting:
                    self._running.pop(trial.number, None)
            self._changed.set()

    def _note_workers(self) -> None:
        """Tells the storage on how many workers the study runs; they come and go."""
        workers = max(self._slots, self.running)
        if workers != self._told_workers and self._told_workers_pause.is_due():
            self._tuned.storage.begin_user_attr(self._tuned.id, WORKERS_KEY, workers)
            self._told_workers = workers

    def _claim(self) -> optuna.Trial | None:
        """The next trial to run; None where finished and running ones make up the budget."""
        with self._deciding:
            finished, open_trials = self._progress.look(self._tuned.trials())
            if self._stopping or finished + len(self._running) >= self._tuned.budget:
                return None
            # Trials of a coordinator that died go first; trials of others are left alone.
            for trial in open_trials:
                if trial.state != TrialState.RUNNING or trial.number in self._running:
                    continue
                if COORDINATOR_KEY in trial.user_attrs:
                    return self._adopt(trial)
            if self._stop_rule is not None and self._stop_rule.ends_the_study:
                # A trial that was told a moment ago may still count as running.
                in_flight = sum(
                    trial.number in self._running and not trial.state.is_finished()
                    for trial in open_trials
                )
                self._end_early(finished + in_flight, self._stop_rule.reason())
                return None
            if not self._is_precision_decided:  # there is a slot now, and so a worker to judge by
                self._tuned.name_value()
                self._tuned.decide_precision(fast_bfloat16=self._workers.has_fast_bfloat16())
                self._is_precision_decided = True
            asked = self._tuned.study.ask()
            self._tuned.record.spec.space.suggest(asked)
            if COORDINATOR_KEY not in asked.user_attrs:  # enqueued by the user
                asked.set_user_attr(COORDINATOR_KEY, "enqueued")
            self._record(Decision(trial=asked.number, kind="ask", epoch=None, verdict=None))
            self._running[asked.number] = 0
            return asked

    def _end_early(self, trials: int, reason: str) -> None:
        self._watcher.say(
            f"The study ends after {trials} of {counted(self._tuned.budget, 'trial')}: {reason}."
        )
        self._tuned.end_early(trials, reason)

    def _adopt(self, trial: FrozenTrial) -> optuna.Trial:
        resumed = optuna.Trial(self._tuned.study, trial._trial_id)
        self._count_resumption(resumed)
        self._running[trial.number] = trial.last_step or 0
        had = counted(trial.last_step or 0, "epoch")
        with about(trial=trial.number):
            self._watcher.say(f"Trial {trial.number} resumes; it had {had}.")
        return resumed

    def _drive(self, trial: optuna.Trial) -> None:
        # What will be trained must stand in the database before a checkpoint of it can.
        self._tuned.storage.flush()
        self._claimed[trial.number] = trial
        try:
            self._tell(trial, *self._outcome(trial))
        finally:
            self._claimed.pop(trial.number, None)
            self._pages.pop(trial.number, None)

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
                losses = Losses.of(trial.user_attrs).after(
                    lost, progressed=reported_epochs(trial) > before
                )
                self._note_losses(trial, losses)
                if losses.is_poison:
                    return TrialState.PRUNED, None
                self._count_resumption(trial)
                with about(trial=trial.number):
                    self._watcher.say(f"Trial {trial.number}: {lost}; it resumes under its number.")
            except (TunerError, TrainingPausedError):
                raise
            except Exception as error:
                if self._stopping:
                    raise TrainingPausedError from error
                trial.set_user_attr(DETAIL_KEY, f"{type(error).__name__}: {error}")
                return TrialState.FAIL, None

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float | None) -> None:
        page = self._pages.get(trial.number)
        said: dict[str, str] = {}
        if page is not None:
            said = page.end(state, may_draw=self._tuned.storage.lease.ensure)
        with self._together():
            for key, words in said.items():
                trial.set_user_attr(key, words)
            told = self._tuned.study.tell(trial, value, state)
            self._record(
                Decision(
                    trial=trial.number, kind="tell", epoch=told.last_step, verdict=told.state.name
                )
            )
        # Nothing that cannot be undone before the end of the trial is committed.
        self._tuned.storage.flush()
        # Who was frozen since, and replaced, would remove what the next coordinator needs.
        self._tuned.storage.lease.ensure()
        artifacts = self._tuned.artifacts
        artifacts.drop_checkpoint(trial.number)
        if state == TrialState.COMPLETE:
            with self._deciding:
                best = {kept.number for kept in self._tuned.ranked()[:KEPT_WEIGHTS]}
                if self._tuned.storage.lease.ensure():
                    artifacts.keep_weights(best | set(self._running))
        self._watcher.trial_ended(told)
        with self._deciding:
            if self._stop_rule is not None:
                self._stop_rule.ended(told)
            self._count_failures(told)

    def _count_failures(self, told: FrozenTrial) -> None:
        self._failures = self._failures.after(told.state)
        if self._failures.are_too_many:
            raise StudyError(
                f"{FAILURES_IN_A_ROW} trials in a row failed, so the study stops; the last "
                f"reason, of trial {told.number}: {told.user_attrs.get(DETAIL_KEY)}. "
                "Fix that and launch again: nothing that finished is lost."
            )

    def _note_losses(self, trial: optuna.Trial, losses: Losses) -> None:
        for key, count in losses.attributes().items():
            if trial.user_attrs.get(key) != count:
                trial.set_user_attr(key, count)
        if losses.is_poison:
            trial.set_user_attr(ENDED_KEY, "worker_lost")
            trial.set_user_attr(DETAIL_KEY, f"{losses.most} workers died of it without a new epoch")
            trial.set_constraint(ENDED_KEY, 1.0)

    def _count_resumption(self, trial: optuna.Trial) -> None:
        trial.set_user_attr(RESUMED_KEY, int(trial.user_attrs.get(RESUMED_KEY, 0)) + 1)

    def _watched_train(self, job: TrainingJob) -> Generator[EpochResult, None, None]:
        trial = job.trial
        if trial not in self._pages:
            self._pages[trial] = TrialPage(self._tuned, self._claimed[trial], job.config)
            self._pages[trial].begin()
        epochs = self._workers.train(job)
        with contextlib.closing(epochs):
            for result in epochs:
                self._running[trial] = max(self._running[trial], result.epoch)
                self._watcher.epoch(trial, result)
                self._pages[trial].epoch(result, may_draw=self._tuned.storage.lease.is_certain)
                yield result

    def _record_verdict(self, trial: FrozenTrial, prunes: bool) -> None:
        self._record(
            Decision(
                trial=trial.number,
                kind="rung",
                epoch=trial.last_step,
                verdict="prune" if prunes else "go",
            )
        )

    def _record(self, decision: Decision) -> None:
        self._tuned.storage.record_decision(decision)


class _Progress:
    """How far a study is; trials that are known to be finished are not looked at again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = 0  # so many trials from number 0 on have ended
        self._finished = 0  # of those, COMPLETE or PRUNED

    def look(self, trials: Sequence[FrozenTrial]) -> tuple[int, list[FrozenTrial]]:
        """The number of finished trials, and those among which the open ones are."""
        with self._lock:
            while self._ended < len(trials) and trials[self._ended].state.is_finished():
                self._finished += trials[self._ended].state in FINISHED
                self._ended += 1
            rest = list(trials[self._ended :])
            return self._finished + sum(trial.state in FINISHED for trial in rest), rest
