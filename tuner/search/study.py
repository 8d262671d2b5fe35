"""A study: its spec, sampler, pruner and identity, created once and loaded ever after."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import itertools
import os
import platform
import time
import unicodedata
import uuid
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from tuner.artifacts import HUNG_PREFIXES, StudyArtifacts, study_folder_name
from tuner.commands import command
from tuner.data.prepare import SOLUBILITY_FILE, DataIdentity, find_source, source_sha256
from tuner.data.prepare import source_files as named_files
from tuner.errors import StudyError, StudyInUseError, counted
from tuner.search.attributes import (
    BFLOAT16_FROM_KEY,
    BUDGET_KEY,
    ENDED_EARLY_KEY,
    ERROR_KEY,
    RECORD_KEY,
    RESUMED_KEY,
    STOP_KEY,
    VALUE_NAME,
    WORKERS_KEY,
)
from tuner.spec.precision import BFLOAT16_FROM, Precision, precision_by_size
from tuner.spec.space import ModelConfig
from tuner.spec.spec import StopSettings, StudySpec, rungs_counted_up, spec_from_document
from tuner.storage.storage import COORDINATOR_KEY, Storage
from tuner.train import ACCURACY_KEY, PARAMETERS_KEY, ROC_AUC_KEY

#: Begins the name of a study that is being made; no study file may give such a name.
_MAKING = ".making."
_MAKING_SECONDS = 3600.0  #: nobody takes that long to make one

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
#: Versions that are stored with a study and go into every export.
_RECORDED_PACKAGES = ("tuner", "optuna", "keras", "numpy", "sqlalchemy", "distributed")

State = Literal["queued", "running", "stopped", "finished", "reported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """What a study was made of: written at its creation, never changed."""

    spec: StudySpec
    data: DataIdentity
    development_sha256: str  #: of the development file, under artifacts/development
    precision: Literal["auto", "float32", "bfloat16"]  #: see `TunedStudy.precision_of`
    sampler: Mapping[str, Any]  #: class and settings
    pruner: Mapping[str, Any]
    versions: Mapping[str, str]
    folder: str  #: of its artifacts, under the artifacts root
    created_at: str  #: ISO 8601, UTC


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedStudy:
    """An open study."""

    study: optuna.Study
    record: StudyRecord
    storage: Storage
    artifacts: StudyArtifacts

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def id(self) -> int:
        return self.study._study_id

    @property
    def key(self) -> str:
        """Unique to this study: the ledger knows it by this, also when its name is used again."""
        return self.record.folder

    @property
    def budget(self) -> int:
        return int(self.study.user_attrs[BUDGET_KEY])

    @property
    def stop(self) -> StopSettings | None:
        """When it ends before its budget."""
        document = self.study.user_attrs.get(STOP_KEY)
        return None if document is None else StopSettings(**document)

    def end_early(self, trials: int, reason: str) -> None:
        """Lowers the budget to `trials`, so that for everybody the study is finished then."""
        self.study.set_user_attr(ENDED_EARLY_KEY, reason)
        self.study.set_user_attr(BUDGET_KEY, trials)

    def precision_of(self, config: ModelConfig) -> Precision:
        """In which precision the study trains this network."""
        asked = self.record.precision
        if asked != "auto":
            return asked
        fewest = self.study.user_attrs.get(BFLOAT16_FROM_KEY)
        return precision_by_size(config, self.record.data.max_length, fewest)

    def name_value(self) -> None:
        """Names a trial's value, for the dashboard's axes and Optuna's data frames."""
        if self.study.metric_names is None:
            with warnings.catch_warnings(
                action="ignore", category=optuna.exceptions.ExperimentalWarning
            ):
                self.study.set_metric_names([VALUE_NAME])

    def decide_precision(self, *, fast_bfloat16: bool) -> None:
        """Decides what "auto" means, once: also for who takes the study up on other machines.

        Args:
            fast_bfloat16: Every worker of this moment multiplies bfloat16 in hardware.
        """
        if self.record.precision == "auto" and BFLOAT16_FROM_KEY not in self.study.user_attrs:
            fewest = BFLOAT16_FROM if fast_bfloat16 else None
            self.study.set_user_attr(BFLOAT16_FROM_KEY, fewest)

    def command(self, *words: object) -> str:
        """A command that a message suggests, with the options that find this study."""
        return command(*words, storage=self.storage.url, artifacts=self.artifacts.folder.parent)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def ranked(self) -> list[FrozenTrial]:
        """Fully trained trials, best validation loss first; ties by number."""
        complete = [trial for trial in self.trials(TrialState.COMPLETE) if trial.value is not None]
        return sorted(complete, key=lambda trial: (trial.value, trial.number))


class PerTrialSampler(BaseSampler):
    """Samples every parameter of every trial from a generator of its own.

    Seeded by (study seed, trial number, parameter name), so that what a trial draws depends
    on the finished trials alone: not on how many workers there are, on who asks first, or on
    a coordinator that died between two parameters.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        entropy = [self._seed, trial.number, *param_name.encode()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return self._make(seed).sample_independent(study, trial, param_name, param_distribution)


def make_sampler(spec: StudySpec) -> PerTrialSampler:
    """The sampler of the study file, with the settings that were measured best."""
    if spec.sampler.kind == "random":
        return PerTrialSampler(lambda seed: RandomSampler(seed=seed), spec.seed)
    return PerTrialSampler(lambda seed: TPESampler(**TPE_SETTINGS, seed=seed), spec.seed)


TPE_SETTINGS: dict[str, Any] = {"multivariate": False, "constant_liar": True}


def make_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """Hyperband over completed epochs, or none."""
    if spec.hyperband is None:
        return optuna.pruners.NopPruner()
    return _Hyperband(spec.hyperband.eta, spec.brackets, spec.bracket_turns)


class _Hyperband(optuna.pruners.BasePruner):
    """Hyperband (arXiv:1603.06560) of Optuna's asynchronous successive halving.

    Optuna's `HyperbandPruner` draws a trial's bracket from a hash of the study's name and the
    trial's number. Here brackets take turns as in the paper (`bracket_turns`), so that
    a study's name changes nothing, and a budget has the shares that `tuner check` tells.
    """

    def __init__(self, eta: int, brackets: Sequence[Sequence[int]], turns: tuple[int, ...]) -> None:
        self._eta = eta
        self._brackets = brackets
        self._turns = turns
        self._halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=eta)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        bracket = self._turns[trial.number % len(self._turns)]
        epochs = trial.last_step or 0
        reached = sum(1 for rung in self._brackets[bracket] if rung <= epochs)
        if reached == 0:
            return False
        # Successive halving has its rungs after 1, eta, eta^2, ...: what it is shown is the value
        # after as many of those as the trial reached of the bracket's.
        shown = copy.copy(trial)
        step = self._eta ** (reached - 1)
        shown.intermediate_values = {step: trial.intermediate_values[epochs]}
        return self._halving.prune(_BracketStudy(study, self._turns, bracket), shown)


class _BracketStudy(optuna.Study):
    """A study that shows one bracket's trials alone, which is what successive halving compares."""

    def __init__(self, study: optuna.Study, turns: tuple[int, ...], bracket: int) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._turns = turns
        self._bracket = bracket

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        # All of them, for a trial's place in the list is its number.
        trials = super().get_trials(deepcopy=deepcopy)
        return [
            trial
            for trial, bracket in zip(trials, itertools.cycle(self._turns))
            if bracket == self._bracket and (states is None or trial.state in states)
        ]


class RecordedPruner(optuna.pruners.BasePruner):
    """A pruner whose verdicts are taken one at a time, told, and never taken twice."""

    def __init__(
        self,
        inner: optuna.pruners.BasePruner,
        recorded: Mapping[tuple[int, int | None], bool],
        on_verdict: Callable[[FrozenTrial, bool], None],
        deciding: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Wraps a pruner.

        Args:
            inner: Who decides.
            recorded: Verdicts of earlier runs, by trial number and epoch.
            on_verdict: Hears each new one before it takes effect.
            deciding: Gives the block in which one verdict is taken.
        """
        self.inner = inner
        self._recorded = dict(recorded)
        self._on_verdict = on_verdict
        self._deciding = deciding

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        # Successive halving marks a rung as done when it decides: asked again, it would say go.
        rung = (trial.number, trial.last_step)
        if rung not in self._recorded:
            with self._deciding():
                self._recorded[rung] = self.inner.prune(study, trial)
                self._on_verdict(trial, self._recorded[rung])
        return self._recorded[rung]


def create_or_resume(
    storage: Storage,
    spec: StudySpec,
    data: DataIdentity,
    *,
    development_sha256: str,
    artifacts_root: Path,
) -> TunedStudy:
    """The study of this name with the budget and the stop rule of the study file.

    For who does not drive it: a coordinator calls `find_or_create`, and `take_settings` once it
    holds the lease.

    Raises:
        StudyError: See `find_or_create`; or it is being run, and not as the study file says.
    """
    tuned = find_or_create(
        storage,
        spec,
        data,
        development_sha256=development_sha256,
        artifacts_root=artifacts_root,
    )
    changes = _changed_settings(tuned, spec)
    # More trials for a study in the service's queue: whoever drives it hears of them.
    only_more = set(changes) == {BUDGET_KEY} and spec.trials > tuned.budget
    if only_more and tuned.id in storage.queued():
        _set_attributes(tuned, changes)
    elif changes:
        try:
            storage.set_undriven(tuned.id, changes)
        except StudyInUseError as error:
            raise StudyError(
                f"{error} It runs to {counted(tuned.budget, 'trial')}; this launch asks for "
                f"{_differing_settings(tuned, spec)}. Nothing was changed."
            ) from error
    return tuned


def find_or_create(
    storage: Storage,
    spec: StudySpec,
    data: DataIdentity,
    *,
    development_sha256: str,
    artifacts_root: Path,
) -> TunedStudy:
    """The study of this name: the one that stands there, unchanged, or a new one.

    Raises:
        StudyError: A study of this name was made from another study file or other data, is no
            study of the tuner, or was reported and should train more trials.
    """
    name = study_name(spec, data)
    if find_name(name, optuna.get_all_study_names(storage.optuna)) is None:
        # What is typed and what another system's file names are made of differ in the letters'
        # composition: new studies have one of them.
        name = unicodedata.normalize("NFC", name)
        _create(storage, name, spec, data, development_sha256)
    tuned = load(storage, name, artifacts_root=artifacts_root)
    _refuse_another_study(tuned, spec, data)
    _refuse_more_trials_after_the_report(tuned, spec.trials)
    return _renew_folder(tuned, spec)


def take_settings(tuned: TunedStudy, spec: StudySpec) -> None:
    """Gives a study the budget and the stop rule of a study file: for who holds its lease."""
    _set_attributes(tuned, _changed_settings(tuned, spec))


def _changed_settings(tuned: TunedStudy, spec: StudySpec) -> dict[str, Any]:
    """The study attributes by which a study differs from what a launch asks for."""
    asked: dict[str, Any] = {ERROR_KEY: None}
    if (tuned.budget, tuned.stop) != (spec.trials, spec.stop):
        asked |= {
            BUDGET_KEY: spec.trials,
            STOP_KEY: spec.stop and spec.stop.model_dump(),
            ENDED_EARLY_KEY: None,
        }
    known = tuned.study.user_attrs
    folder, data = known[RECORD_KEY]["spec_folder"], known[RECORD_KEY]["spec"]["data"]
    if (folder, data["source"]) != (str(spec.folder), spec.to_document()["data"]["source"]):
        asked[RECORD_KEY] = _record_document(tuned.record)
    return {key: value for key, value in asked.items() if known.get(key) != value}


def _set_attributes(tuned: TunedStudy, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        tuned.study.set_user_attr(key, value)


def _differing_settings(tuned: TunedStudy, spec: StudySpec) -> str:
    """What a launch asks for, in words, where the study has something else."""
    differing = [] if tuned.budget == spec.trials else [f"{spec.trials} trials"]
    if tuned.stop != spec.stop:
        stop = spec.stop and spec.stop.model_dump()
        differing.append("no [stop]" if stop is None else f"[stop] {stop}")
    if tuned.study.user_attrs[RECORD_KEY]["spec_folder"] != str(spec.folder):
        differing.append(f"the data from {spec.folder}")
    return " and ".join(differing) or "the same"


def _renew_folder(tuned: TunedStudy, spec: StudySpec) -> TunedStudy:
    """The study with its study file where that was launched now: the folder may have moved.

    The data is the same there (`_refuse_another_study`), so its test rows are, too. The record in
    the storage follows with the other settings that a launch changes.
    """
    old = tuned.record.spec
    if (old.folder, old.data.source) == (spec.folder, spec.data.source):
        return tuned
    moved = old.model_copy(
        update={
            "folder": spec.folder,
            "data": old.data.model_copy(update={"source": spec.data.source}),
        }
    )
    record = dataclasses.replace(tuned.record, spec=moved)
    return dataclasses.replace(tuned, record=record)


def source_files(tuned: TunedStudy, given: Path | None = None) -> tuple[Path, ...]:
    """The files of the study's data, as `tuner.data.prepare.source_files` orders them.

    Where they are not where the study file was, they are looked for by their content where that
    file lies if the whole project was moved: below the current folder, and above the artifacts.

    Args:
        tuned: The study.
        given: Where they are said to be: a file, or a folder.

    Returns:
        The files; as they were named, where they are not found. None of synthetic data, nor of the
        data set "solubility" where it lies neither at `given` nor in a folder that was moved.

    Raises:
        StudyError: `given` does not have them.
    """
    record, settings = tuned.record, tuned.record.spec.data
    if record.data.synthetic:
        if given is not None:
            raise StudyError(
                f"--data {given}: the data of study {tuned.name!r} is synthetic; leave it out."
            )
        return ()
    if given is not None:
        return _given_files(tuned, given)
    named = named_files(settings, record.spec.folder)
    if named and all(os.access(file, os.F_OK) for file in named):
        return named
    return find_source(settings, _moved_folders(tuned), record.data.sha256) or named


def _given_files(tuned: TunedStudy, given: Path) -> tuple[Path, ...]:
    """The files of the study's data at a place that the user names.

    Raises:
        StudyError: They are not there.
    """
    settings, sha256 = tuned.record.spec.data, tuned.record.data.sha256
    found: tuple[Path, ...] | None
    try:
        if given.is_dir():
            found = find_source(settings, [given.absolute()], sha256)
        else:
            _refuse_another_kind_of_file(tuned, given)
            found = (given.absolute(),) if source_sha256([given]) == sha256 else None
    except OSError as error:
        raise StudyError(f"--data {given}: {error.strerror or error}.") from error
    if found is None:
        raise StudyError(
            f"--data {given}: the data of study {tuned.name!r} is not there; it is "
            f"{tuned.record.data.source}, with sha256 {sha256}."
        )
    return found


def _refuse_another_kind_of_file(tuned: TunedStudy, given: Path) -> None:
    """The suffix says how a file is read, and a pair is two files.

    Raises:
        StudyError: The file cannot be the study's data.
    """
    named = named_files(tuned.record.spec.data, Path()) or (Path(SOLUBILITY_FILE),)
    suffix = named[0].suffix.lower()
    if len(named) == 1 and given.suffix.lower() == suffix:
        return
    what = (
        "the folder that holds both files"
        if len(named) > 1
        else f"a {suffix} file, or the folder that holds it"
    )
    raise StudyError(
        f"--data {given}: the data of study {tuned.name!r} is {tuned.record.data.source}; "
        f"name {what}."
    )


def _moved_folders(tuned: TunedStudy) -> Iterator[Path]:
    """Where the study file's folder may be now, if it was moved with all that is around it."""
    parts = tuned.record.spec.folder.parts[1:]
    root = tuned.artifacts.folder.parent.absolute()
    for base in (Path.cwd(), *root.parents[:2]):
        for first in range(len(parts) + 1):
            yield base.joinpath(*parts[first:])


def _create(
    storage: Storage, name: str, spec: StudySpec, data: DataIdentity, development_sha256: str
) -> None:
    """Makes a study under a name of its own, and gives it the real one when it is whole.

    Several launches may do so at once: the first to finish is the study.
    """
    _remove_what_was_cut_off(storage)
    study = optuna.create_study(
        storage=storage.optuna,
        study_name=f"{_MAKING}{int(time.time())}.{uuid.uuid4().hex[:8]}",
        direction="minimize",
    )
    record = StudyRecord(
        spec=spec,
        data=data,
        development_sha256=development_sha256,
        precision=spec.training.precision,
        sampler=_sampler_document(spec),
        pruner=_pruner_document(spec),
        versions=versions(),
        folder=study_folder_name(name),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    study.set_user_attr(BUDGET_KEY, spec.trials)
    if spec.stop is not None:
        study.set_user_attr(STOP_KEY, spec.stop.model_dump())
    for known in spec.known:
        # Marked as ours from its first transaction on: see database.COORDINATOR_KEY.
        study.enqueue_trial(dict(known), user_attrs={COORDINATOR_KEY: "known"})
    study.set_user_attr(RECORD_KEY, _record_document(record))
    if not storage.name_study(study._study_id, name):
        optuna.delete_study(study_name=study.study_name, storage=storage.optuna)


def _remove_what_was_cut_off(storage: Storage) -> None:
    """Removes studies whose making began long ago and never ended."""
    for name in optuna.get_all_study_names(storage.optuna):
        if name.startswith(_MAKING):
            began = int(name.removeprefix(_MAKING).partition(".")[0])
            if abs(time.time() - began) > _MAKING_SECONDS:
                with contextlib.suppress(KeyError):  # another launch removed it a moment ago
                    optuna.delete_study(study_name=name, storage=storage.optuna)


def study_name(spec: StudySpec, data: DataIdentity) -> str:
    """The name of the study in the storage.

    A fallback to synthetic data is another study, so that it never collides with a later
    one on the real data.
    """
    fell_back = data.synthetic and spec.data.source != "synthetic"
    return f"{spec.name}-synthetic" if fell_back else spec.name


def find_name(name: str, names: Collection[str]) -> str | None:
    """`name` if it is one of `names`, else the one that differs in Unicode normalisation alone."""
    if name in names:
        return name
    wanted = unicodedata.normalize("NFC", name)
    equal = (known for known in names if unicodedata.normalize("NFC", known) == wanted)
    return min(equal, default=None)


def load(storage: Storage, name: str, *, artifacts_root: Path) -> TunedStudy:
    """Opens a study that exists, by its name in any Unicode normalisation.

    Raises:
        StudyError: There is none of this name, or it is no study of the tuner.
    """
    names = [known.study_name for known in storage.optuna.get_all_studies()]
    found = find_name(name, names)
    if found is None:
        listed = ", ".join(sorted(names)) or "none yet"
        launch = command("launch", "SPEC", storage=storage.url, artifacts=artifacts_root)
        raise StudyError(
            f"{storage.masked_url} holds no study {name!r}; it holds: {listed}. "
            f"`{launch}` makes one."
        )
    study = optuna.load_study(study_name=found, storage=storage.optuna)
    document = study.user_attrs.get(RECORD_KEY)
    if document is None:
        raise StudyError(
            f"Study {name!r} in {storage.masked_url} was not made by `tuner launch`; give yours "
            "another name (--name)."
        )
    record = _record_from_document(document)
    study.sampler, study.pruner = make_sampler(record.spec), make_pruner(record.spec)
    return TunedStudy(
        study=study,
        record=record,
        storage=storage,
        artifacts=StudyArtifacts(artifacts_root / record.folder),
    )


def delete(tuned: TunedStudy) -> None:
    """Removes a study and its artifacts; the ledger's rows stay.

    Development rows leave the storage with the last study that names them. Their file stays:
    another storage may share the artifacts' folder, and its studies may need it.

    Raises:
        StudyError: It is running.
    """
    lease = tuned.storage.lease(tuned.id)
    if lease is not None and lease.is_live:
        raise StudyError(
            f"Study {tuned.name!r} is being run by process {lease.holder.pid} on "
            f"{lease.holder.host}; `{tuned.command('stop', tuned.name)}` first."
        )
    _take_down_what_hangs(tuned)
    tuned.artifacts.delete()
    tuned.storage.forget(tuned.id)
    optuna.delete_study(study_name=tuned.name, storage=tuned.storage.optuna)
    tuned.storage.drop_development(RECORD_KEY, "development_sha256")


def _take_down_what_hangs(tuned: TunedStudy) -> None:
    """Removes the files that the dashboard shows with a study and its trials."""
    trials = tuned.trials()
    tuned.artifacts.take_down_pages(trial.number for trial in trials)
    for identity in _hanging(tuned, trials):
        tuned.artifacts.take_down(identity)


def _hanging(tuned: TunedStudy, trials: Iterable[FrozenTrial]) -> Iterator[str]:
    """The ids of the files that the dashboard shows with a study and its trials."""
    on_study = tuned.storage.optuna.get_study_system_attrs(tuned.id)
    for attributes in (on_study, *(trial.system_attrs for trial in trials)):
        for key, value in attributes.items():
            if key.startswith(HUNG_PREFIXES) and value != "null":  # what was taken down
                yield key.rpartition(":")[2]


def refuse_a_reported_study(tuned: TunedStudy) -> None:
    """A study whose test split was opened trains nothing more.

    Raises:
        StudyError: It is such a study.
    """
    if tuned.storage.ledger(study_key=tuned.key):
        raise StudyError(
            f"The test split of study {tuned.name!r} was opened by its report, so it "
            "trains no more trials. Start a new study (--name) with another split seed."
        )


def clear_error(tuned: TunedStudy) -> None:
    """Forgets why the service gave the study up: it was launched again."""
    if tuned.study.user_attrs.get(ERROR_KEY) is not None:
        tuned.study.set_user_attr(ERROR_KEY, None)


def list_names(storage: Storage) -> list[str]:
    """The studies of the tuner in this storage, by name."""
    # Not Optuna's summaries: they copy every trial of every study.
    return sorted(
        known.study_name
        for known in storage.optuna.get_all_studies()
        if RECORD_KEY in known.user_attrs and not known.study_name.startswith(_MAKING)
    )


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in (*_RECORDED_PACKAGES, "tensorflow-cpu", "tensorflow"):
        try:
            found[package.removesuffix("-cpu")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """Where a study stands; `to_document` is what `tuner status --json` prints."""

    study: str
    state: State
    budget: int
    counts: Mapping[str, int]  #: trials by state
    best: FrozenTrial | None
    epochs_spent: int
    epochs_saved: int  #: epochs that Hyperband's pruning left untrained
    workers: int
    resumed_trials: int
    brackets: tuple[int, ...]  #: trials per bracket
    synthetic: bool
    bytes_on_disk: int
    error: str | None  #: why the service gave it up
    ended_early: str | None  #: why it ended before the budget that was asked for

    @property
    def finished_trials(self) -> int:
        return sum(self.counts[state.name] for state in FINISHED)

    @property
    def trials_in_words(self) -> str:
        """The states that occur: "12 COMPLETE, 30 PRUNED, 2 RUNNING".

        To Optuna a trial is RUNNING until it is told, also while its study is not: then it is
        "to resume".
        """
        words = {"RUNNING": "RUNNING" if self.state == "running" else "to resume"}
        found = [f"{count} {words.get(name, name)}" for name, count in self.counts.items() if count]
        return ", ".join(found) or "none yet"

    def to_document(self) -> dict[str, Any]:
        best = None
        if self.best is not None:
            best = {
                "trial": self.best.number,
                "validation_loss": self.best.value,
                **figures_in(self.best),
                "sampled": self.best.params,
            }
        return {
            "study": self.study,
            "state": self.state,
            "budget": self.budget,
            "trials": dict(self.counts),
            "best": best,
            "epochs": {"spent": self.epochs_spent, "saved": self.epochs_saved},
            "workers": self.workers,
            "resumed_trials": self.resumed_trials,
            "brackets": list(self.brackets),
            "synthetic": self.synthetic,
            "bytes_on_disk": self.bytes_on_disk,
            "error": self.error,
            "ended_early": self.ended_early,
        }


def status(tuned: TunedStudy, *, driven: bool = False) -> StudyStatus:
    """Reads where a study stands.

    Args:
        tuned: The study.
        driven: This process drives it: everything is in memory, and no database is asked; the
            thousands of small files that hang in the dashboard are not counted.
    """
    trials = tuned.trials()
    counts = {state.name: 0 for state in TrialState}
    for trial in trials:
        counts[trial.state.name] += 1
    finished = sum(counts[state.name] for state in FINISHED)
    state: State
    if driven:
        state = "running"
    elif tuned.storage.ledger(study_key=tuned.key):
        state = "reported"
    elif (lease := tuned.storage.lease(tuned.id)) is not None and lease.is_live:
        state = "running"
    elif finished >= tuned.budget:
        state = "finished"
    else:
        state = "queued" if tuned.id in tuned.storage.queued() else "stopped"
    attributes = tuned.study.user_attrs
    max_epochs = tuned.record.spec.training.max_epochs
    ranked = tuned.ranked()
    return StudyStatus(
        study=tuned.name,
        state=state,
        budget=tuned.budget,
        counts=counts,
        best=ranked[0] if ranked else None,
        epochs_spent=sum(trial.last_step or 0 for trial in trials),
        epochs_saved=sum(
            max_epochs - (trial.last_step or 0)
            for trial in trials
            if trial.state == TrialState.PRUNED and not _could_not_go_on(trial)
        ),
        workers=int(attributes.get(WORKERS_KEY, 0)) if state == "running" else 0,
        resumed_trials=sum(1 for trial in trials if trial.user_attrs.get(RESUMED_KEY)),
        brackets=tuned.record.spec.trials_of_brackets(len(trials)),
        synthetic=tuned.record.data.synthetic,
        bytes_on_disk=tuned.artifacts.bytes_on_disk(() if driven else _hanging(tuned, trials)),
        error=attributes.get(ERROR_KEY),
        ended_early=attributes.get(ENDED_EARLY_KEY),
    )


def figures_in(trial: FrozenTrial) -> dict[str, float | None]:
    """Accuracy, ROC AUC and parameters among a trial's attributes; None where it has none.

    Trials of earlier versions have their parameters alone.
    """
    return {key: trial.user_attrs.get(key) for key in (ACCURACY_KEY, ROC_AUC_KEY, PARAMETERS_KEY)}


def _could_not_go_on(trial: FrozenTrial) -> bool:
    """Whether a pruned trial diverged or the like: Hyperband then saved nothing."""
    return any(violation > 0 for violation in trial.constraints.values())


def _refuse_another_study(tuned: TunedStudy, spec: StudySpec, data: DataIdentity) -> None:
    advice = (
        f"Give the new one another name (--name), or remove the old "
        f"(`{tuned.command('delete', tuned.name)}`)."
    )
    if tuned.record.spec.spec_hash != spec.spec_hash:
        keys = _differing_keys(tuned.record.spec.to_document(), spec.to_document())
        raise StudyError(
            f"Study {tuned.name!r} exists and was made from another study file: "
            f"{', '.join(keys)} differ. {advice}"
        )
    for field in ("sha256", "split_id"):
        old, new = getattr(tuned.record.data, field), getattr(data, field)
        if old != new:
            raise StudyError(
                f"Study {tuned.name!r} exists and was made from other data ({field} {old[:12]}, "
                f"now {new[:12]}). {advice}"
            )


def _refuse_more_trials_after_the_report(tuned: TunedStudy, trials: int) -> None:
    if trials > tuned.budget and tuned.storage.ledger(study_key=tuned.key):
        raise StudyError(
            f"The test split of study {tuned.name!r} was opened by its report, so it takes no more "
            f"trials (budget {tuned.budget}, asked for {trials}). Start a new study "
            "(--name) with another split seed."
        )


def _differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values."""
    keys = []
    for key in dict.fromkeys([*old, *new]):
        if prefix == "" and key in ("name", "trials", "stop"):
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            keys += _differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(f"{prefix}{key} ({before!r}, now {after!r})")
    return keys


def _sampler_document(spec: StudySpec) -> dict[str, Any]:
    if spec.sampler.kind == "random":
        return {"class": "RandomSampler"}
    return {"class": "TPESampler", **TPE_SETTINGS}


def _pruner_document(spec: StudySpec) -> dict[str, Any]:
    if spec.hyperband is None:
        return {"class": "NopPruner"}
    return {
        "class": "Hyperband",
        **spec.hyperband.model_dump(),
        "brackets": "in turn",
        "rungs": list(spec.rungs),
    }


def _record_document(record: StudyRecord) -> dict[str, Any]:
    fields = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name not in ("spec", "data")
    }
    return {
        **fields,
        "spec": record.spec.to_document(),
        "spec_hash": record.spec.spec_hash,
        "spec_folder": str(record.spec.folder),
        "data": record.data.to_document(),
    }


def _record_from_document(document: Mapping[str, Any]) -> StudyRecord:
    fields = dict(document)
    fields.pop("spec_hash")
    folder = Path(fields.pop("spec_folder"))
    spec = _with_its_rungs(
        spec_from_document(fields.pop("spec"), folder=folder), document["pruner"]
    )
    return StudyRecord(spec=spec, data=DataIdentity.from_document(fields.pop("data")), **fields)


def _with_its_rungs(spec: StudySpec, pruner: Mapping[str, Any]) -> StudySpec:
    """The spec with the rungs that the study was made with.

    Its trials hold their values at those; compared at others, trials of two lengths would compete.
    """
    settings = spec.hyperband
    if settings is None:
        return spec
    earlier = rungs_counted_up(settings.min_epochs, spec.training.max_epochs, settings.eta)
    its_rungs = tuple(pruner.get("rungs", earlier))
    return (
        spec if its_rungs == spec.rungs else spec.model_copy(update={"made_with_rungs": its_rungs})
    )
