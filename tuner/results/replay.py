"""Trains a trial again from what is stored, and compares the curves.

Weights, shuffling and dropout follow from the study's seed and the trial's number, so the curve is
the same bit for bit where the same programs compute on the same kind of processor.

Why: `docs/decisions.md#when-is-a-replayed-curve-the-same`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from optuna.trial import FrozenTrial, TrialState

from tuner.cluster.environment import differences, environment
from tuner.cluster.processes import require_training, training_environment
from tuner.data.development import load_development
from tuner.errors import EndReason, StudyError, TrialEndedError, counted
from tuner.search.attributes import ENDED_KEY, ENVIRONMENTS_KEY, PRECISION_KEY, curve_of
from tuner.search.development import study_development
from tuner.search.tuned_study import TunedStudy
from tuner.train import Environment, EpochResult, TrainingJob

#: By how much a curve may differ where something else computed it, by figure: losses in nats,
#: shares of rows. Measured, see `docs/replay.md#tolerances`.
TOLERANCES = {
    "training_loss": 0.05,
    "training_accuracy": 0.05,
    "validation_loss": 0.05,
    "validation_accuracy": 0.05,
    "validation_roc_auc": 0.05,
}
#: Ends of a trial that come again wherever it is trained.
_REPEATABLE: frozenset[EndReason] = frozenset({"diverged"})


class Run(Protocol):
    """A training, as `tuner.network.training.TrainingRun` is one."""

    def epochs(self) -> Iterator[EpochResult]: ...


#: Begins a training with so many threads.
OpenRun: TypeAlias = Callable[[TunedStudy, TrainingJob, int], Run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first figure that differs."""

    epoch: int  #: counted from 1
    figure: str  #: a field of `EpochResult`, or "epochs"
    stored: float | str | None
    replayed: float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay of one trial found."""

    study: str
    trial: int
    epochs: int  #: that were compared
    is_exact: bool  #: every figure has the same bits
    within_tolerances: bool
    first_difference: Difference | None  #: of the bits
    largest_difference: float  #: of a validation loss, nats
    #: By name, what was stored and what is here; None: not stored (of an earlier version).
    differs: dict[str, tuple[object, object]] | None

    @property
    def same_environment(self) -> bool:
        return self.differs == {}

    @property
    def equal(self) -> bool:
        """Bit for bit on the same machine and settings, within the tolerances elsewhere."""
        return self.is_exact or (self.within_tolerances and not self.same_environment)

    def to_document(self) -> dict[str, Any]:
        """What `tuner replay --json` prints of a trial."""
        return {
            "study": self.study,
            "trial": self.trial,
            "equal": self.equal,
            "bit_for_bit": self.is_exact,
            "epochs": self.epochs,
            "first_difference": self.first_difference and dataclasses.asdict(self.first_difference),
            "largest_difference": self.largest_difference,
            "tolerances": TOLERANCES,
            "environment": None
            if self.differs is None
            else {
                name: {"stored": stored, "here": here}
                for name, (stored, here) in self.differs.items()
            },
        }


def replay(
    tuned: TunedStudy,
    number: int,
    *,
    on_epoch: Callable[[EpochResult], None] = lambda _: None,
    open_run: OpenRun | None = None,
) -> Replay:
    """Trains a trial again in this process, and compares each epoch with the stored curve.

    Precision, threads and seeds are those that are stored; nothing of the study changes.

    Args:
        tuned: The study.
        number: The trial's.
        on_epoch: Is told of each epoch.
        open_run: Begins a training; the network's by default.

    Raises:
        StudyError: There is no such trial, it has no curve, or its rows are missing.
        SetupError: This installation cannot train.
    """
    trial = _trial(tuned, number)
    stored = curve_of(trial)
    parts: Sequence[Environment] = trial.system_attrs.get(ENVIRONMENTS_KEY, ())
    threads = int(parts[0]["threads"]) if parts else 1
    run = (open_run or _open_run)(tuned, _job(tuned, trial), threads)
    replayed: list[EpochResult] = []
    ended = None
    try:
        for epoch in run.epochs():
            replayed.append(epoch)
            on_epoch(epoch)
            if len(replayed) > len(stored) or (
                len(replayed) == len(stored) and not _ended_by_itself(trial)
            ):
                break
    except TrialEndedError as end:
        ended = end.reason
    found = list(_differences(trial, stored, replayed, ended))
    losses = [
        abs(one.validation_loss - other.validation_loss)
        for one, other in zip(stored, replayed, strict=False)
    ]
    return Replay(
        study=tuned.name,
        trial=number,
        epochs=min(len(stored), len(replayed)),
        is_exact=not found,
        within_tolerances=all(map(_is_within_tolerance, found)),
        first_difference=found[0] if found else None,
        largest_difference=max(losses, default=0.0),
        differs=_what_differs(parts, environment(threads)),
    )


def _trial(tuned: TunedStudy, number: int) -> FrozenTrial:
    trials = tuned.trials()
    if not 0 <= number < len(trials):
        raise StudyError(
            f"Study {tuned.name!r} has no trial {number}; it has {counted(len(trials), 'trial')}, "
            "counted from 0."
        )
    trial = trials[number]
    if not trial.state.is_finished():
        raise StudyError(f"Trial {number} of study {tuned.name!r} has not ended yet.")
    if not curve_of(trial):
        raise StudyError(
            f"Trial {number} of study {tuned.name!r} has no curve to compare with: it ended before "
            "its first epoch."
        )
    return trial


def _job(tuned: TunedStudy, trial: FrozenTrial) -> TrainingJob:
    spec = tuned.record.spec
    config = spec.space.resolve(trial.params)
    return TrainingJob(
        config=config,
        trial=trial.number,
        seed=spec.seed,
        precision=trial.user_attrs.get(PRECISION_KEY) or tuned.precision_of(config),
        rungs=(),
        # Another machine may be slower.
        settings=spec.training.model_copy(update={"max_trial_seconds": math.inf}),
        reshuffle=spec.data.split.reshuffle_seed,
    )


def _open_run(tuned: TunedStudy, job: TrainingJob, threads: int) -> Run:
    require_training()
    data = load_development(study_development(tuned), tuned.record.development_sha256)
    os.environ.update(training_environment(threads))  # before TensorFlow is imported
    from tuner.network.fold_runs import open_run, tensors_of  # noqa: PLC0415
    from tuner.network.training import configure_tensorflow  # noqa: PLC0415

    configure_tensorflow(threads)
    return open_run(tensors_of(data), job)


def _ended_by_itself(trial: FrozenTrial) -> bool:
    """Whether the training, not a verdict or a fault of its worker, ended the trial."""
    reason = trial.user_attrs.get(ENDED_KEY)
    return trial.state == TrialState.COMPLETE or reason in _REPEATABLE


def _differences(
    trial: FrozenTrial,
    stored: Sequence[EpochResult],
    replayed: Sequence[EpochResult],
    ended: str | None,
) -> Iterator[Difference]:
    for one, other in zip(stored, replayed, strict=False):
        for figure in TOLERANCES:
            before, now = getattr(one, figure), getattr(other, figure)
            # What another version did not record is no difference.
            if before is not None and not math.isnan(before) and before != now:
                yield Difference(epoch=one.epoch, figure=figure, stored=before, replayed=now)
        folds = zip(one.fold_losses or (), other.fold_losses or (), strict=False)
        for fold, (before, now) in enumerate(folds, start=1):
            if before != now:
                figure = f"validation_loss of fold {fold}"
                yield Difference(epoch=one.epoch, figure=figure, stored=before, replayed=now)
    reason = trial.user_attrs.get(ENDED_KEY)
    if ended != (reason if reason in _REPEATABLE else None):
        yield Difference(epoch=len(replayed) + 1, figure="ended", stored=reason, replayed=ended)
    elif len(stored) != len(replayed):
        yield Difference(
            epoch=min(len(stored), len(replayed)) + 1,
            figure="epochs",
            stored=len(stored),
            replayed=len(replayed),
        )


def _is_within_tolerance(difference: Difference) -> bool:
    """Where a curve's minimum moves, so may the epoch in which patience ends it."""
    if difference.figure == "epochs":
        return True
    stored, replayed = difference.stored, difference.replayed
    return (
        isinstance(stored, float)
        and isinstance(replayed, float)
        and abs(stored - replayed) <= TOLERANCES[difference.figure.partition(" ")[0]]
    )


def _what_differs(
    parts: Sequence[Environment], here: Environment
) -> dict[str, tuple[object, object]] | None:
    """What differs from any worker that trained a part of the trial."""
    if not parts or len(parts[0]) == 1:
        return None
    found: dict[str, tuple[object, object]] = {}
    for part in parts:
        found |= differences(part, here)
    return found
