"""Derives a search again from its stored history: every suggestion, every verdict, every end.

What a suggestion saw follows from the order of the decisions: the trials that were asked for and
told before. So the same sampler and pruner, over a study in memory that takes the same decisions
in the same order, must come to the same results; the first that they do not is named.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import counted
from tuner.search.attributes import AUDITED_KEY, ENDED_KEY, RESUMED_KEY, curve_of
from tuner.search.hyperband import make_pruner, verdict_of
from tuner.search.record import versions
from tuner.search.sampler import make_sampler
from tuner.search.tuned_study import TunedStudy
from tuner.storage.decisions import Decision
from tuner.storage.lease import COORDINATOR_KEY

#: Packages whose versions suggestions and verdicts depend on.
_DECIDING = ("optuna", "numpy", "tuner")
#: Begins the system attribute of a trial that broke a limit.
_CONSTRAINT = "constraints:"
#: The system attribute of a trial that was enqueued: what it takes instead of suggestions.
_FIXED = "fixed_params"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unexplained:
    """A decision that the history does not lead to."""

    decision: int | None  #: its place in the history, counted from 1; None: of a trial without one
    trial: int
    kind: str  #: "ask", "rung" or "tell"
    epoch: int | None
    reason: str

    @property
    def in_words(self) -> str:
        at = "" if self.decision is None else f"decision {self.decision}, "
        epoch = "" if self.epoch is None else f" at epoch {self.epoch}"
        return f"{at}{_KINDS[self.kind]} trial {self.trial}{epoch}: {self.reason}"


_KINDS = {"ask": "suggestion for", "rung": "verdict on", "tell": "end of"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReplay:
    """What `tuner replay NAME --search` found."""

    study: str
    decisions: int
    asks: int
    verdicts: int
    ends: int
    explained_decisions: int  #: before the first that is not
    first_unexplained: Unexplained | None
    notes: tuple[str, ...]

    @property
    def explained(self) -> bool:
        return self.first_unexplained is None

    def to_document(self) -> dict[str, Any]:
        """What `tuner replay NAME --search --json` prints."""
        return {"explained": self.explained, **dataclasses.asdict(self)}


class _UnexplainedError(Exception):
    """Why a decision is not what the history leads to."""


def replay_search(
    tuned: TunedStudy, *, on_decision: Callable[[int, int], None] = lambda _at, _of: None
) -> SearchReplay:
    """Derives a search again; trains nothing, and changes nothing.

    Args:
        tuned: The study; one that still runs is derived as far as it is stored.
        on_decision: Is told of each decision: its place, and how many there are.
    """
    decisions = tuned.storage.decisions.of(tuned.id)
    trials = tuned.trials()
    search = _Search(tuned, trials, decisions)
    first: Unexplained | None = None
    explained = 0
    for at, decision in enumerate(decisions, start=1):
        on_decision(at, len(decisions))
        try:
            search.take(decision)
        except _UnexplainedError as error:
            first = Unexplained(
                decision=at,
                trial=decision.trial,
                kind=decision.kind,
                epoch=decision.epoch,
                reason=str(error),
            )
            break
        explained = at
    kinds = [decision.kind for decision in decisions]
    return SearchReplay(
        study=tuned.name,
        decisions=len(decisions),
        asks=kinds.count("ask"),
        verdicts=kinds.count("rung"),
        ends=kinds.count("tell"),
        explained_decisions=explained,
        first_unexplained=first or search.without_decisions(),
        notes=tuple(_notes(tuned, trials)),
    )


def _notes(tuned: TunedStudy, trials: Sequence[FrozenTrial]) -> Iterator[str]:
    now = versions()
    for package in _DECIDING:
        before = tuned.record.versions.get(package)
        if before != now.get(package):
            yield f"{package} {before} made the study, {now.get(package)} derives it here."
    others = [trial for trial in trials if COORDINATOR_KEY not in trial.user_attrs]
    if others:
        yield (
            f"{counted(len(others), 'trial')} of other programs: not derived, but seen by the "
            "suggestions after them, as far as their times tell."
        )


class _Search:
    """A study in memory that takes the decisions of a stored one."""

    def __init__(
        self, tuned: TunedStudy, trials: Sequence[FrozenTrial], decisions: Sequence[Decision]
    ) -> None:
        self._spec = tuned.record.spec
        self._stored = trials
        self._memory = optuna.storages.InMemoryStorage()
        logging = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=self._memory,
            direction="minimize",
            sampler=make_sampler(self._spec),
            pruner=make_pruner(self._spec),
        )
        optuna.logging.set_verbosity(logging)
        self._asked = {decision.trial for decision in decisions if decision.kind == "ask"}
        # A new trial's number is the next one; those that wait already are asked for in any order.
        self._due = deque(
            sorted(
                number
                for number in self._asked
                if number < len(trials) and _FIXED not in trials[number].system_attrs
            )
        )
        self._told: set[int] = set()
        self._verdicts: dict[int, dict[int, str]] = defaultdict(dict)  # by trial and epoch

    def take(self, decision: Decision) -> None:
        """Takes a decision.

        Raises:
            _UnexplainedError: It is another one than the stored.
        """
        if not 0 <= decision.trial < len(self._stored):
            raise _UnexplainedError("there is no such trial (any more).")
        if decision.trial in self._told:
            raise _UnexplainedError("the trial had ended before.")
        {"ask": self._ask, "rung": self._judge, "tell": self._tell}[decision.kind](decision)

    def without_decisions(self) -> Unexplained | None:
        """A trial that ended without a decision that says so."""
        for trial in self._stored:
            is_ours = COORDINATOR_KEY in trial.user_attrs
            if is_ours and trial.state.is_finished() and trial.number not in self._told:
                return Unexplained(
                    decision=None,
                    trial=trial.number,
                    kind="tell",
                    epoch=trial.last_step,
                    reason=f"it is {trial.state.name}, and no decision ended it.",
                )
        return None

    # --- suggestions ---

    def _ask(self, decision: Decision) -> None:
        stored = self._stored[decision.trial]
        if self._state(stored.number) not in (None, TrialState.WAITING):
            raise _UnexplainedError("it was asked for before.")
        if _FIXED not in stored.system_attrs and self._due.popleft() != stored.number:
            raise _UnexplainedError("trials before it were not asked for yet.")
        self._make_up_to(stored.number)
        self._end_those_of_others(stored)
        trial_id = self._id(stored.number)
        self._memory.set_trial_state_values(trial_id, TrialState.RUNNING)
        trial = optuna.Trial(self._study, trial_id)
        self._spec.space.suggest(trial)
        if trial.params != stored.params:
            raise _UnexplainedError(_differing(stored.params, trial.params))

    def _make_up_to(self, number: int) -> None:
        """Makes the trials up to this number, which wait until they are asked for."""
        for stored in self._stored[len(self._memory.get_all_trials(self._study._study_id)) :]:
            if stored.number > number:
                break
            fixed = {key: value for key, value in stored.system_attrs.items() if key == _FIXED}
            waiting = optuna.create_trial(state=TrialState.WAITING, system_attrs=fixed)
            self._memory.create_new_trial(self._study._study_id, waiting)

    def _end_those_of_others(self, asked: FrozenTrial) -> None:
        """Takes in the trials that other programs had ended by the time of a suggestion."""
        for trial in self._memory.get_all_trials(self._study._study_id, deepcopy=False):
            stored = self._stored[trial.number]
            if (
                COORDINATOR_KEY not in stored.user_attrs
                and trial.state == TrialState.WAITING
                and stored.datetime_complete is not None
                and asked.datetime_start is not None
                and stored.datetime_complete <= asked.datetime_start
            ):
                self._begin_as_stored(stored)
                for step, value in stored.intermediate_values.items():
                    self._memory.set_trial_intermediate_value(trial._trial_id, step, value)
                self._memory.set_trial_state_values(trial._trial_id, stored.state, stored.values)

    def _begin_as_stored(self, stored: FrozenTrial) -> None:
        trial_id = self._id(stored.number)
        self._memory.set_trial_state_values(trial_id, TrialState.RUNNING)
        for name, value in stored.params.items():
            distribution = stored.distributions[name]
            internal = distribution.to_internal_repr(value)
            self._memory.set_trial_param(trial_id, name, internal, distribution)

    # --- verdicts ---

    def _judge(self, decision: Decision) -> None:
        stored, epoch = self._begun(decision.trial), decision.epoch or 0
        if epoch not in self._spec.rungs:
            raise _UnexplainedError(f"no rung is there; rungs are after {self._spec.rungs}.")
        self._report(stored, epoch)
        trial = self._memory.get_trial(self._id(stored.number))
        derived = verdict_of(self._study.pruner, self._study, trial)
        if derived != decision.verdict:
            raise _UnexplainedError(f"stored is {decision.verdict!r}, derived {derived!r}.")
        self._verdicts[stored.number][epoch] = derived

    def _report(self, stored: FrozenTrial, epochs: int) -> None:
        """Reports the values of the first epochs, which must be those of the stored curve."""
        best = math.inf
        curve = {result.epoch: result for result in curve_of(stored)}
        known = self._memory.get_trial(self._id(stored.number)).intermediate_values
        for step in range(1, epochs + 1):
            value = stored.intermediate_values.get(step)
            if value is None:
                raise _UnexplainedError(f"its value after epoch {step} is not stored.")
            if step in curve:
                best = min(best, curve[step].validation_loss)
                if best != value:
                    raise _UnexplainedError(
                        f"its value after epoch {step} is {value!r}, and its curve's {best!r}."
                    )
            if step not in known:
                self._memory.set_trial_intermediate_value(self._id(stored.number), step, value)

    # --- ends ---

    def _tell(self, decision: Decision) -> None:
        stored = self._begun(decision.trial)
        epochs = stored.last_step or 0
        if (decision.verdict, decision.epoch or 0) != (stored.state.name, epochs):
            raise _UnexplainedError(
                f"stored is {stored.state.name} after {counted(epochs, 'epoch')}, decided was "
                f"{decision.verdict} after {counted(decision.epoch or 0, 'epoch')}."
            )
        self._report(stored, epochs)
        self._check_the_way(stored, epochs)
        for key, value in stored.system_attrs.items():
            if key.startswith(_CONSTRAINT):
                self._memory.set_trial_system_attr(self._id(stored.number), key, value)
        value = None
        if stored.state == TrialState.COMPLETE:
            value = min(stored.intermediate_values.values(), default=math.inf)
        told = self._study.tell(stored.number, value, stored.state)
        if told.value != stored.value:
            raise _UnexplainedError(f"its value is {stored.value!r}, derived {told.value!r}.")
        audited = self._memory.get_trial(self._id(stored.number)).user_attrs.get(AUDITED_KEY)
        if audited != stored.user_attrs.get(AUDITED_KEY):
            raise _UnexplainedError(
                f"{AUDITED_KEY} is {stored.user_attrs.get(AUDITED_KEY)!r}, derived {audited!r}."
            )
        self._told.add(stored.number)

    def _check_the_way(self, stored: FrozenTrial, epochs: int) -> None:
        """Whether the verdicts on a trial, and its curve, lead to its end."""
        verdicts, ended = self._verdicts[stored.number], ENDED_KEY in stored.user_attrs
        for rung in self._spec.rungs:
            is_judged = rung < epochs or (rung == epochs and not ended)
            if is_judged and rung not in verdicts and stored.state != TrialState.FAIL:
                raise _UnexplainedError(f"no verdict on it is stored at epoch {rung}.")
        if stored.state == TrialState.PRUNED and not ended:
            if verdicts.get(epochs) != "prune":
                raise _UnexplainedError(f"it is PRUNED, and no verdict at epoch {epochs} says so.")
        elif stored.state == TrialState.COMPLETE and not self._is_finished(stored, epochs):
            raise _UnexplainedError(
                f"it is COMPLETE after {counted(epochs, 'epoch')}, which neither max_epochs nor "
                "patience explains."
            )

    def _is_finished(self, stored: FrozenTrial, epochs: int) -> bool:
        settings = self._spec.training
        losses = [result.validation_loss for result in curve_of(stored)]
        if epochs >= settings.max_epochs or not losses:
            return True
        waited = len(losses) - 1 - losses.index(min(losses))
        return settings.patience is not None and waited >= settings.patience

    # --- trials ---

    def _begun(self, number: int) -> FrozenTrial:
        """A stored trial, which runs in memory."""
        stored = self._stored[number]
        if self._state(number) in (None, TrialState.WAITING):
            # Its coordinator died between making it and the suggestion; the next one went on.
            if number in self._asked or RESUMED_KEY not in stored.user_attrs:
                raise _UnexplainedError("it was not asked for before.")
            self._make_up_to(number)
            self._begin_as_stored(stored)
        return stored

    def _state(self, number: int) -> TrialState | None:
        trials = self._memory.get_all_trials(self._study._study_id, deepcopy=False)
        return trials[number].state if number < len(trials) else None

    def _id(self, number: int) -> int:
        return self._memory.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


def _differing(stored: Mapping[str, Any], derived: Mapping[str, Any]) -> str:
    names = [name for name in {**stored, **derived} if stored.get(name) != derived.get(name)]
    first = names[0]
    more = f" (and {counted(len(names) - 1, 'more parameter')})" if len(names) > 1 else ""
    return f"{first} is {stored.get(first)!r}, derived {derived.get(first)!r}{more}."
