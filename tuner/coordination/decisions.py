"""The decisions of a study: which trial is next, who is pruned, how a trial ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.coordination.losses import FAILURES_IN_A_ROW, Failures
from tuner.errors import StudyError, counted
from tuner.logs import about
from tuner.search.attributes import DETAIL_KEY, OF_CONFIGURATION_KEY, RESUMED_KEY
from tuner.search.confirmation import enqueue_training
from tuner.search.hyperband import RecordedPruner, Verdict
from tuner.search.stop_rule import StopRule
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.storage.decisions import Decision, DecisionKind
from tuner.storage.lease import COORDINATOR_KEY

#: The best trials whose weights are kept: more do not make a better ensemble
#: (docs/experiments.md#2026-11-27-how-many-kept-networks-pay).
KEPT_WEIGHTS = 10


class Decisions:
    """Takes one decision at a time, and records each with what it writes.

    So their order (ask with all its suggests, rung verdict, tell) can be replayed.
    """

    def __init__(
        self,
        tuned: TunedStudy,
        *,
        has_fast_bfloat16: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        """Decides nothing yet.

        Args:
            tuned: The study.
            has_fast_bfloat16: Whether all who train multiply bfloat16 in hardware, as of now.
            say: Tells the user, a line at a time.
        """
        self._tuned = tuned
        self._has_fast_bfloat16 = has_fast_bfloat16
        self._say = say
        self._lock = threading.RLock()  # its holder may wait for the database
        self._claimed: set[int] = set()  # numbers of trials that were claimed and not released
        self._is_closed = False  # nothing more is to be claimed
        self._is_precision_decided = False
        self._progress = _Progress()
        self._failures = Failures()
        self._stop_rule: StopRule | None = None

    def begin(self) -> None:
        """Adopts what earlier coordinators decided, once the lease is held."""
        recorded: dict[tuple[int, int | None], Verdict] = {
            (decision.trial, decision.epoch): cast("Verdict", decision.verdict)
            for decision in self._tuned.storage.decisions.of(self._tuned.id)
            if decision.kind == "rung"
        }
        study = self._tuned.study
        pruner = study.pruner.inner if isinstance(study.pruner, RecordedPruner) else study.pruner
        study.pruner = RecordedPruner(pruner, recorded, self._record_verdict, self._together)
        if (settings := self._tuned.stop) is not None:
            self._stop_rule = StopRule(settings, self._tuned.trials(*FINISHED))

    @property
    def claimed(self) -> int:
        """Trials in flight."""
        return len(self._claimed)

    def unfinished(self) -> int:
        """Trials that the budget still asks for, those in flight included."""
        finished, _ = self._progress.look(self._tuned.trials())
        return max(0, self._tuned.budget - finished)

    def close(self) -> None:
        """From now on no trial is claimed."""
        self._is_closed = True

    def claim(self) -> optuna.Trial | None:
        """The next trial to run; None where finished and running ones make up the budget."""
        with self._lock:
            finished, rest = self._progress.look(self._tuned.trials())
            if self._is_closed or finished + len(self._claimed) >= self._tuned.budget:
                return None
            trial = self._left_open(rest)
            if trial is None and not self._ends_early(finished, rest):
                trial = self._ask()
            if trial is not None:
                self._claimed.add(trial.number)
            return trial

    def release(self, trial: int) -> None:
        """A claimed trial has ended, or stays open for another coordinator."""
        self._claimed.discard(trial)

    def tell(
        self,
        trial: optuna.Trial,
        state: TrialState,
        value: float | None,
        attributes: Mapping[str, str],
    ) -> FrozenTrial:
        """Ends a trial with attributes that say how; waits until the database has it."""
        with self._together():
            for key, words in attributes.items():
                trial.set_user_attr(key, words)
            told = self._tuned.study.tell(trial, value, state)
            if told.state == TrialState.FAIL and OF_CONFIGURATION_KEY in told.user_attrs:
                label = told.user_attrs[OF_CONFIGURATION_KEY]
                enqueue_training(self._tuned.study, label, told.params)
            self._record("tell", told.number, epoch=told.last_step, verdict=told.state.name)
        # Nothing that cannot be undone before the end of the trial is committed.
        self._tuned.storage.flush()
        return told

    def keep_best_weights(self) -> None:
        """Removes the weights of all but the best trials, and of those in flight.

        A confirmation keeps all: its networks are compared row by row.
        """
        if self._tuned.confirms:
            return
        with self._lock:
            best = {kept.number for kept in self._tuned.ranked()[:KEPT_WEIGHTS]}
            if self._tuned.storage.lease.ensure():
                self._tuned.artifacts.keep_weights(best | self._claimed)

    def count(self, told: FrozenTrial) -> None:
        """Counts a trial that ended, for the stop rule and against the study.

        Raises:
            StudyError: Too many trials in a row failed.
        """
        with self._lock:
            if self._stop_rule is not None:
                self._stop_rule.ended(told)
            self._failures = self._failures.after(told.state)
            if self._failures.are_too_many:
                raise StudyError(
                    f"{FAILURES_IN_A_ROW} trials in a row failed, so the study stops; the last "
                    f"reason, of trial {told.number}: {told.user_attrs.get(DETAIL_KEY)}. "
                    "Fix that and launch again: nothing that finished is lost."
                )

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """One decision at a time; what it writes is committed whole, or not at all."""
        with self._lock, self._tuned.storage.together():
            yield

    def _left_open(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """A trial of a coordinator that died, if there is one; trials of others are left alone."""
        for trial in trials:
            is_open = trial.state == TrialState.RUNNING and trial.number not in self._claimed
            if is_open and COORDINATOR_KEY in trial.user_attrs:
                resumed = optuna.Trial(self._tuned.study, trial._trial_id)
                count_resumption(resumed)
                had = counted(trial.last_step or 0, "epoch")
                with about(trial=trial.number):
                    self._say(f"Trial {trial.number} resumes; it had {had}.")
                return resumed
        return None

    def _ends_early(self, finished: int, rest: Sequence[FrozenTrial]) -> bool:
        """Whether the stop rule ends the study with the trials that are in flight."""
        if self._stop_rule is None or not self._stop_rule.ends_the_study:
            return False
        # A trial that was told a moment ago may still be claimed.
        trials = finished + sum(
            trial.number in self._claimed and not trial.state.is_finished() for trial in rest
        )
        reason = self._stop_rule.reason()
        self._say(
            f"The study ends after {trials} of {counted(self._tuned.budget, 'trial')}: {reason}."
        )
        self._tuned.end_early(trials, reason)
        return True

    def _ask(self) -> optuna.Trial:
        """A new trial, with its configuration."""
        if not self._is_precision_decided:  # there is a slot now, and so a worker to judge by
            self._tuned.name_value()
            self._tuned.decide_precision(fast_bfloat16=self._has_fast_bfloat16())
            self._is_precision_decided = True
        asked = self._tuned.study.ask()
        self._tuned.record.spec.space.suggest(asked)
        if COORDINATOR_KEY not in asked.user_attrs:  # enqueued by the user
            asked.set_user_attr(COORDINATOR_KEY, "enqueued")
        self._record("ask", asked.number)
        return asked

    def _record_verdict(self, trial: FrozenTrial, verdict: Verdict) -> None:
        self._record("rung", trial.number, epoch=trial.last_step, verdict=verdict)

    def _record(
        self,
        kind: DecisionKind,
        trial: int,
        *,
        epoch: int | None = None,
        verdict: str | None = None,
    ) -> None:
        decision = Decision(trial=trial, kind=kind, epoch=epoch, verdict=verdict)
        self._tuned.storage.record_decision(decision)


def count_resumption(trial: optuna.Trial) -> None:
    """Notes that a trial is resumed once more."""
    trial.set_user_attr(RESUMED_KEY, int(trial.user_attrs.get(RESUMED_KEY, 0)) + 1)


class _Progress:
    """How far a study is; trials that are known to be finished are not looked at again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = 0  # trials that have ended, all from number 0 on
        self._finished = 0  # of those, COMPLETE or PRUNED

    def look(self, trials: Sequence[FrozenTrial]) -> tuple[int, list[FrozenTrial]]:
        """The number of finished trials, and those among which the open ones are."""
        with self._lock:
            while self._ended < len(trials) and trials[self._ended].state.is_finished():
                self._finished += trials[self._ended].state in FINISHED
                self._ended += 1
            rest = list(trials[self._ended :])
            return self._finished + sum(trial.state in FINISHED for trial in rest), rest
