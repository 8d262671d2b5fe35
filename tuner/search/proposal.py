"""A first study file for a source: its settings, a space of fitting size, a budget."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import tomli_w

from tuner.commands import command
from tuner.data.sources import file_names, name_from
from tuner.data.survey import Survey
from tuner.errors import counted
from tuner.spec.architecture import KEYS, misfits
from tuner.spec.bounds import tightest
from tuner.spec.mistakes import toml_value
from tuner.spec.reader import spec_from_document
from tuner.spec.schema import SCHEMA_LINE
from tuner.spec.spec import ColumnSettings, StudySpec, name_problem
from tuner.spec.tables import read_space
from tuner.train import TrainingTime

if TYPE_CHECKING:
    import jinja2

COVERED = 0.99  #: of the sequences, which `max_length` does not cut
_STRETCH = 1.25  #: `max_length` is raised by up to so much where it then cuts none
_RARE_CLASS = 0.25  #: share of the rarer class below which both count the same in training
_MOST_TRIALS = 200  #: of these spaces; more seldom find better ones
_FEWEST_TRIALS = 10
_UNMEASURED_TRIALS = 50
_BUSY = 0.9  #: of the time, in which workers train; else they wait for decisions and rungs
_LARGEST = 6  #: times the mean epoch of a space, that one of its largest network may take
_ENOUGH_TRIALS = 30  #: for fewer, an epoch is so long that a trial has to have fewer of them
_MOST_LETTERS = 200  #: of names that a comment lists
_FEW_ROWS = 2_000  #: of which more are held back, for splits that are large enough


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """What is searched for sources of a size."""

    rows: float  #: sources with fewer rows
    space: Mapping[str, Any]


def _space(**changes: Any) -> dict[str, Any]:
    return {
        "embedding_dim": {"choices": [8, 16, 32]},
        "blocks": {"low": 1, "high": 2},
        "kernel_size": {"low": 3, "high": 11, "step": 2},
        "filters": {"choices": [16, 32, 64]},
        "normalization": {"choices": ["none", "batch"]},
        "activation": {"choices": ["relu", "gelu"]},
        "pool_size": {"low": 2, "high": 4},
        "conv_dropout": {"low": 0.0, "high": 0.3},
        "head": {"choices": ["global_max", "global_average", "global_both"]},
        "dense_layers": 1,
        "units": {"choices": [32, 64, 128]},
        "dense_dropout": {"low": 0.05, "high": 0.35},
        "conv_l2": {"low": 1e-6, "high": 1e-2, "log": True},
        "learning_rate": {"low": 5e-4, "high": 1e-2, "log": True},
        "batch_size": {"choices": [32, 64]},
    } | changes


#: From the smallest: fewer rows carry fewer weights.
_SIZES = (
    _Size(
        rows=1_000,
        space=_space(
            embedding_dim={"choices": [4, 8]},
            blocks=1,
            kernel_size={"low": 3, "high": 9, "step": 2},
            filters={"choices": [8, 16]},
            units={"choices": [16, 32]},
            dense_dropout={"low": 0.1, "high": 0.5},
            batch_size={"choices": [16, 32]},
        ),
    ),
    _Size(rows=10_000, space=_space()),
    _Size(
        rows=100_000,
        space=_space(
            embedding_dim={"choices": [8, 16, 32, 64]},
            blocks={"low": 1, "high": 3},
            filters={"choices": [16, 32, 64, 128]},
            units={"choices": [32, 64, 128, 256]},
            batch_size={"choices": [32, 64, 128]},
        ),
    ),
    _Size(
        rows=math.inf,
        space=_space(
            embedding_dim={"choices": [16, 32, 64]},
            blocks={"low": 1, "high": 3},
            filters={"choices": [32, 64, 128]},
            units={"choices": [64, 128, 256]},
            conv_dropout={"low": 0.0, "high": 0.2},
            dense_dropout={"low": 0.0, "high": 0.3},
            batch_size={"choices": [128, 256]},
        ),
    ),
)


def space_for(rows: int, max_length: int) -> dict[str, Any]:
    """A `[space]` for a source: the fewer rows, the smaller its networks.

    Args:
        rows: Different sequences.
        max_length: Residues; no kernel or pooling is longer than what is left of them.
    """
    space = dict(next(size.space for size in _SIZES if rows < size.rows))
    if max_length >= 100:
        space["block1"] = {"pool_size": 4}
    while misfits(tightest(read_space(space, [])), max_length):
        space.pop("block1", None)
        if space["blocks"] != 1:
            space["blocks"] = 1
        elif space["pool_size"] != 1:
            space["pool_size"] = 1
        else:
            space["kernel_size"] = min(3, max_length)
    return space


def max_length_for(survey: Survey) -> int:
    """Residues that cover 99 % of the sequences, or all where that takes little more."""
    lengths = survey.lengths
    covering = int(lengths[math.ceil(COVERED * len(lengths)) - 1])
    longest = int(lengths[-1])
    return longest if longest <= _STRETCH * covering else covering


def name_for(path: Path) -> str:
    """The name of a study whose study file is called so."""
    return path.stem if name_problem(path.stem) is None else "my-study"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a study may spend."""

    trials: int = _MOST_TRIALS
    max_epochs: int = 27
    max_trial_seconds: int = 3600
    epochs_a_trial: float = 0.0  #: in the mean, as Hyperband is expected to prune
    hours: float = 0.0  #: that it is expected to take
    time: TrainingTime | None = None  #: None: not measured

    @property
    def duration(self) -> str:
        """`hours` in words."""
        if self.hours < 1:
            return counted(max(round(60 * self.hours), 1), "minute")
        return f"{self.hours:.1f} hours"


UNMEASURED = Budget(trials=_UNMEASURED_TRIALS)


def budget_for(survey: Survey, path: Path, time: TrainingTime, hours: float) -> Budget:
    """The budget of a study that ends within a number of hours with all workers of this machine."""
    spec = proposed_spec(survey, path)

    def planned(max_epochs: int) -> Budget:
        training = spec.training.model_copy(update={"max_epochs": max_epochs})
        epochs = spec.model_copy(update={"training": training}).planned_epochs / spec.trials
        seconds = (time.start_seconds + epochs * time.epoch_seconds) / (time.workers * _BUSY)
        affordable = _round_down(hours * 3600 / seconds)
        trials = min(max(affordable, _FEWEST_TRIALS), _MOST_TRIALS)
        longest = max_epochs * time.epoch_seconds * _LARGEST
        return Budget(
            trials=trials,
            max_epochs=max_epochs,
            max_trial_seconds=max(3600, math.ceil(longest / 600) * 600),
            epochs_a_trial=epochs,
            hours=trials * seconds / 3600,
            time=time,
        )

    long, short = planned(27), planned(9)
    return long if long.trials >= _ENOUGH_TRIALS else short


def _round_down(number: float) -> int:
    """To two digits: what is measured is not more exact."""
    unit = int(10 ** max(len(str(int(number))) - 2, 0))
    return int(number) // unit * unit


def proposed_spec(survey: Survey, path: Path) -> StudySpec:
    """The study of a study file at `path`, whose budget is not decided yet."""
    text = study_file(survey, path, Budget())
    return spec_from_document(tomllib.loads(text), folder=path.parent.absolute())


def study_file(survey: Survey, path: Path, budget: Budget) -> str:
    """A commented study file.

    Args:
        survey: The source.
        path: Where the file will be; the source is named from its folder.
        budget: What the study may spend.
    """
    max_length = max_length_for(survey)
    space = space_for(survey.rows, max_length)
    return _template().render(
        schema_line=SCHEMA_LINE,
        survey=survey,
        files=[PurePath(name).name for name in file_names(survey.settings)],
        check=_on_one_line(command("check", path)),
        launch=_on_one_line(command("launch", path)),
        name=name_for(path),
        source=_source(survey, path.parent),
        columns=survey.settings.columns if survey.settings.columns != ColumnSettings() else None,
        max_length=max_length,
        longer=int((survey.lengths > max_length).sum()),
        conflicts=survey.conflicts(max_length),
        is_rare=min(survey.soluble, 1 - survey.soluble) < _RARE_CLASS,
        held_back=0.15 if survey.rows < _FEW_ROWS else 0.1,
        budget=budget,
        most_trials=_MOST_TRIALS,
        space={key: f"{key} = {_toml(value)}" for key, value in space.items() if key in KEYS},
        block1=space.get("block1"),
        meaning={name: key.meaning for name, key in KEYS.items()},
    )


def _toml(value: object) -> str:
    """A value in TOML, on one line."""
    if isinstance(value, str):  # with whatever is in a path
        return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return toml_value(value)


def _listed(names: Iterable[str]) -> str:
    """Names of files or columns, as a comment shows them."""
    text = _on_one_line(", ".join(names))
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 4]} ..."


def _on_one_line(text: str) -> str:
    """The text as a comment can hold it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _source(survey: Survey, folder: Path) -> str | dict[str, str]:
    """The study file's `data.source`."""
    names = [name_from(folder, Path(name), name) for name in file_names(survey.settings)]
    source = survey.settings.source
    if isinstance(source, str):
        return names[0]
    return dict(zip(source.model_dump(), names, strict=True))


@cache
def _template() -> jinja2.Template:
    import jinja2  # noqa: PLC0415 - what writes no study file starts sooner

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuner.search", ""),
        autoescape=False,  # noqa: S701 - TOML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"toml": _toml, "listed": _listed, "counted": counted}
    return environment.get_template("study_file.toml.jinja")
