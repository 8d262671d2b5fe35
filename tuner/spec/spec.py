"""Study files: `studies/*.toml` -> `StudySpec`, with every mistake reported at once."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    PlainValidator,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tuner.spec.hyperparameter import ParameterValue
from tuner.spec.mistakes import did_you_mean, shown
from tuner.spec.precision import Precision
from tuner.spec.schedule import bracket_turns, halvings, rungs
from tuner.spec.space import SearchSpace

MAX_NAME_LENGTH = 80  # characters; with "-synthetic" and a suffix still a file name everywhere
MAX_FOLDS = 20  #: a trial trains so many networks
_MAX_NAME_BYTES = 160  #: the same in UTF-8, of which a file's name has at most 255 in all
#: Of tables, which alone have columns; each may be compressed.
_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_SUFFIXES = (".npz", *_TABLES)
#: For the JSON schema: the greater part of `name_problem`.
NAME_PATTERN = r'^[^\s.\-/\\:*?"<>|][^/\\:*?"<>|\u0000-\u001f]*$'


def name_problem(name: str) -> str | None:
    """What keeps `name` from being a study's name, with the remedy; None where nothing does.

    The name becomes file names, on any system, and an argument of commands.
    """
    if not name.strip():
        return "must not be empty; give the study a name"
    if len(name) > MAX_NAME_LENGTH:
        return f"has {len(name)} characters; a name has at most {MAX_NAME_LENGTH}"
    if (size := len(name.encode("utf-8", "replace"))) > _MAX_NAME_BYTES:
        return f"has {len(name)} characters of {size} bytes; a name has at most {_MAX_NAME_BYTES}"
    if name != name.strip():
        return f"must not begin or end with a space, as {shown(name)} does; remove it"
    if bad := sorted({letter for letter in name if letter in '/\\:*?"<>|' or not _prints(letter)}):
        listed = " ".join(letter if _prints(letter) else f"U+{ord(letter):04X}" for letter in bad)
        them = "it" if len(bad) == 1 else "them"
        return f"must not contain {listed}, as {shown(name)} does; remove {them}"
    if name[0] in ".-" or name[-1] == ".":
        return f"must not begin with . or -, or end with ., as {shown(name)} does"
    return None


def derived_name(study: str, what: str) -> str:
    """The name of a study that is made from another one: "NAME-what".

    Where that would be longer than a name may be, the name of `study` is cut, and a part of its
    hash keeps apart what begins alike.
    """
    name = f"{study}-{what}"
    if name_problem(name) is None:
        return name
    mark = hashlib.sha256(study.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    shortened = (f"{study[:kept]}-{mark}-{what}" for kept in range(len(study), 0, -1))
    return next((one for one in shortened if name_problem(one) is None), f"{mark}-{what}")


def _prints(letter: str) -> bool:
    return letter.isprintable()


# The settings. The attributes' defaults are the file's.


class Table(BaseModel):
    """A table of the study file: nothing is converted, nothing unknown is let through."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _wrong(message: str, *keys: str) -> PydanticCustomError:
    """An error with this message; `keys` are those of a table that have a part in it."""
    context = {"message": message, "keys": " ".join(keys)}
    return PydanticCustomError("mistake", "{message}", context)


def _check_name(name: str) -> str:
    if problem := name_problem(name):
        raise _wrong(problem)
    return name


def _check_path(path: str) -> str:
    if not path.strip() or "\0" in path:
        raise _wrong(f"must be a path, not {shown(path)}")
    return path


def _check_source(source: str) -> str:
    _check_path(source)
    if source not in ("solubility", "synthetic") and not source.lower().endswith(_SUFFIXES):
        raise _wrong(
            'must be "solubility", "synthetic", a path that ends in .npz, .csv, .tsv, .csv.gz or '
            f'.tsv.gz, or {{ soluble = "a.fasta", insoluble = "b.fasta" }}, not {shown(source)}'
            + did_you_mean(source, ("solubility", "synthetic"))
        )
    return source


def _none_from_word(value: object) -> object:
    return None if value == "none" else value


def _cut_from_truth(value: object) -> object:
    """What `truncate` was before it said where: true cut at the end, false not at all."""
    return {True: "end", False: None}[value] if isinstance(value, bool) else value


def _check_column(name: str) -> str:
    if not name.strip():
        raise _wrong(f"must be the name of a column, not {shown(name)}")
    return name


def _check_data_path(path: str) -> str:
    if not _check_path(path).lower().endswith(_SUFFIXES):
        raise _wrong(
            f"must be a path that ends in .npz, .csv, .tsv, .csv.gz or .tsv.gz, not {shown(path)}"
        )
    return path


_VALUES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": ["string", "integer"]},
}


def _checked_values(given: Any) -> list[str]:
    """Values of a column as text; whole numbers may stand without quotes."""
    items = given if isinstance(given, list) else [given]
    if not items or any(type(item) not in (str, int) or not str(item).strip() for item in items):
        raise _wrong(f'must be a list of values of the column, as in ["2"], not {shown(given)}')
    return list(dict.fromkeys(str(item).strip() for item in items))


def _checked_part(given: Any) -> float | list[str]:
    if isinstance(given, list | str):
        return _checked_values(given)
    if type(given) not in (int, float):
        raise _wrong(f"must be a number above 0 and below 1, not {shown(given)}")
    if not given > 0:
        raise _wrong(f"must be above 0, not {shown(given)}")
    if not given < 1:
        raise _wrong(f"must be below 1, not {shown(given)}")
    return float(given)


def value_key(value: str) -> str:
    """A value of the column of parts as it is compared: upper and lower case are one."""
    return value.strip().lower()


def _none_from_false(value: bool | None) -> bool | None:
    return value or None


def _folds_kind(value: object) -> str:
    return "column" if isinstance(value, Mapping | FoldColumn) else "number"


def _check_provenance(table: dict[str, Any]) -> dict[str, Any]:
    """What can be stored and written again in every format; null says nothing, and is left out."""

    def checked(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {
                name: checked(item, f"{key}.{name}")
                for name, item in value.items()
                if item is not None
            }
        if isinstance(value, list):
            return [checked(item, key) for item in value if item is not None]
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        what = "a finite number" if isinstance(value, float) else "text in quotes, or a number"
        raise _wrong(f"{key} must be {what}, not {shown(value)}")

    return {name: checked(item, name) for name, item in table.items() if item is not None}


Seed: TypeAlias = Annotated[int, Field(ge=0, le=2**32 - 1)]
PathText: TypeAlias = Annotated[str, AfterValidator(_check_path)]
DataPath: TypeAlias = Annotated[str, AfterValidator(_check_data_path)]
ColumnName: TypeAlias = Annotated[str, AfterValidator(_check_column)]
#: Where a sequence that is too long is cut, see `tuner.data.rows.truncated`.
Truncate: TypeAlias = Literal["end", "start", "middle"]
#: What becomes of a letter that is not one of the 20 residues.
Unknown: TypeAlias = Literal["error", "mask"]
#: What becomes of a sequence that has both labels.
Conflicts: TypeAlias = Literal["error", "drop"]
ClassWeights: TypeAlias = Literal["none", "balanced"]
#: How rows are divided.
SplitRule: TypeAlias = Literal["random", "given", "homology"]
SplitPart: TypeAlias = Literal["training", "validation", "test"]
_PARTS: tuple[SplitPart, ...] = get_args(SplitPart)
#: Cross-validation.
Folds: TypeAlias = Annotated[
    Annotated[int, Field(ge=2, le=MAX_FOLDS), Tag("number")]
    | Annotated["FoldColumn", Tag("column")],
    Discriminator(_folds_kind),
]
#: Values of a table's column.
Values: TypeAlias = Annotated[
    list[str], PlainValidator(_checked_values), WithJsonSchema(_VALUES_SCHEMA)
]
#: A fraction of the rows, or values of a column.
Part: TypeAlias = Annotated[
    float | list[str],
    PlainValidator(_checked_part),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                _VALUES_SCHEMA,
            ]
        }
    ),
]


class FoldColumn(Table):
    """Folds that a table names."""

    column: ColumnName
    """of a CSV or TSV file; each of its values is a fold"""


class SplitSettings(Table):
    """How rows are divided into training, validation and test."""

    rule: SplitRule = "random"
    """"random": by the hash of seed and sequence, stratified by label; "given": by a column or by
    three files; "homology": as random, with similar sequences in one part"""
    seed: Seed = 0
    """another seed, another split"""
    validation: Part = 0.1
    """fraction of the rows that choose hyperparameters; with rule "given" the values of `column`"""
    test: Part = 0.1
    """fraction of the rows that stay sealed until the report; with "given" values of `column`"""
    column: ColumnName | None = None
    """of a table, with rule "given": its values say which part a row is in"""
    training: Values | None = None
    """values of `column` whose rows are trained on; left out: all that are not named otherwise"""
    identity: Annotated[float, Field(ge=0, le=1)] | None = None
    """with rule "homology", 0.3 by default: share of residues that similar sequences have alike"""
    coverage: Annotated[float, Field(gt=0, le=1)] | None = None
    """with rule "homology", 0.8 by default: of both sequences, that their alignment covers"""
    folds: Folds | None = None
    """cross-validation: the number of folds, or { column = "..." }; the test split is in none"""
    reshuffle: Annotated[bool | None, AfterValidator(_none_from_false)] = None
    """true: each trial draws validation rows of its own from the development rows"""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults_of_the_rule(cls, table: Any) -> Any:
        if not isinstance(table, Mapping):
            return table
        given = {key: value for key, value in table.items() if value is not None}
        defaults = _DEFAULTS_OF_RULE.get(str(table.get("rule")), {})
        return {**defaults, **given}

    @model_validator(mode="after")
    def _check_keys_of_the_rule(self) -> SplitSettings:
        for key, rule in _KEYS_OF_RULE.items():
            if getattr(self, key) is not None and self.rule != rule:
                raise _wrong(
                    f'{key} is a key of rule = "{rule}", and rule is {shown(self.rule)}; leave it '
                    "out, or write the rule",
                    key,
                )
        if self.rule == "given":
            self._check_values()
        else:
            self._check_fractions()
        if self.reshuffle:
            self._check_reshuffle()
        return self

    def _check_values(self) -> None:
        seen: dict[str, str] = {}
        for key in ("validation", "test", "training"):
            values = getattr(self, key)
            if isinstance(values, float):
                raise _wrong(
                    f'{key} = {values:g} is a fraction, but with rule = "given" it names values of '
                    f'the column, as in {key} = ["{key}"]',
                    key,
                )
            for value in values or ():
                first = seen.setdefault(value_key(value), key)
                if first != key:
                    raise _wrong(
                        f"{shown(value)} is named by {first} and by {key}; name it once", first, key
                    )

    def _check_fractions(self) -> None:
        for key in ("validation", "test"):
            if not isinstance(getattr(self, key), float):
                raise _wrong(
                    f'{key} names values of a column, which takes rule = "given" and '
                    f'column = "..."; with rule = "{self.rule}" it is a fraction, as in '
                    f"{key} = 0.1",
                    key,
                )
        if self.validation_fraction + self.test_fraction >= 1:
            raise _wrong(
                f"validation = {self.validation} and test = {self.test} leave nothing to train on; "
                "their sum must be below 1",
                "validation",
                "test",
            )

    def _check_reshuffle(self) -> None:
        if self.rule != "random":
            raise _wrong(
                f"reshuffle draws validation rows at random, and with rule = {shown(self.rule)} "
                "they stay together; leave reshuffle out",
                "reshuffle",
            )
        if self.folds is not None:
            raise _wrong(
                "reshuffle draws the validation rows of a trial, and with folds every development "
                "row is one; leave one of the two out",
                "reshuffle",
                "folds",
            )

    @property
    def validation_fraction(self) -> float:
        """Of all rows; not of rule "given"."""
        return self.validation if isinstance(self.validation, float) else 0.0

    @property
    def test_fraction(self) -> float:
        """Of all rows; not of rule "given"."""
        return self.test if isinstance(self.test, float) else 0.0

    def part_of(self, value: str) -> SplitPart | None:
        """The part that a value of `column` names; None where it names none."""
        key = value_key(value)
        for part in _PARTS:
            named = getattr(self, part)
            if not isinstance(named, float | None) and key in map(value_key, named):
                return part
        return "training" if self.training is None else None

    @property
    def column_names(self) -> dict[str, str]:
        """The columns that are read for the split, by what they tell of a row: "part", "fold"."""
        names = {} if self.column is None else {"part": self.column}
        if isinstance(self.folds, FoldColumn):
            names["fold"] = self.folds.column
        return names

    @property
    def reshuffle_seed(self) -> int | None:
        """The seed of validation rows of each trial's own; None where all trials have the same."""
        return self.seed if self.reshuffle else None

    @property
    def described(self) -> str:
        """The split with its rule: "random, seed 1", "by column 'partition'"."""
        return f"random, {self.in_words}" if self.rule == "random" else self.in_words

    @property
    def in_words(self) -> str:
        """The split as it is shown: "seed 1", "by column 'partition'"."""
        if self.rule == "given":
            words = "as three files" if self.column is None else f"by column {self.column!r}"
        elif self.rule == "homology":
            words = (
                f"by homology (identity {self.identity:g}, coverage {self.coverage:g}), "
                f"seed {self.seed}"
            )
        else:
            words = f"seed {self.seed}"
        if self.reshuffle:
            return f"{words}, validation reshuffled for each trial"
        if isinstance(self.folds, FoldColumn):
            return f"{words}, folds by column {self.folds.column!r}"
        return words if self.folds is None else f"{words}, {self.folds} folds"


#: What a rule's keys are by default.
_DEFAULTS_OF_RULE: Mapping[str, Mapping[str, Any]] = {
    "given": {"validation": ["validation"], "test": ["test"]},
    "homology": {"identity": 0.3, "coverage": 0.8},
}
#: Keys that one rule alone has.
_KEYS_OF_RULE = {
    "column": "given",
    "training": "given",
    "identity": "homology",
    "coverage": "homology",
}


class FastaPair(Table):
    """Two FASTA files, one for each label."""

    soluble: PathText
    """path of the soluble sequences"""
    insoluble: PathText
    """path of the insoluble sequences"""


class SplitFiles(Table):
    """Three files, one for each part of the split."""

    training: DataPath
    """path of the rows that fit weights (.npz .csv .tsv .csv.gz .tsv.gz)"""
    validation: DataPath
    """path of the rows that choose hyperparameters"""
    test: DataPath
    """path of the rows that stay sealed until the report"""


class ColumnSettings(Table):
    """The columns of a CSV or TSV file; upper and lower case are one."""

    sequence: ColumnName = "sequence"
    """of the residues"""
    label: ColumnName = "label"
    """of the labels"""
    weight: ColumnName | None = None
    """of what each row counts in training, above 0; leave it out where all count the same"""

    @model_validator(mode="after")
    def _name_different_columns(self) -> ColumnSettings:
        names = {"sequence": self.sequence, "label": self.label, "weight": self.weight}
        seen: dict[str, str] = {}
        for key, name in names.items():
            if name is None:
                continue
            first = seen.setdefault(column_key(name), key)
            if first != key:
                raise _wrong(
                    f"{first} and {key} are both {shown(name)}; name a column for each", first, key
                )
        return self


def column_key(name: str) -> str:
    """A column's name as it is compared: upper and lower case are one, as are spaces around it."""
    return name.strip().lower()


def _source_kind(value: object) -> str:
    if isinstance(value, SplitFiles):
        return "files"
    if isinstance(value, Mapping) and not value.keys() & FastaPair.model_fields.keys():
        return "files" if value.keys() & SplitFiles.model_fields.keys() else "pair"
    return "pair" if isinstance(value, Mapping | FastaPair) else "text"


def is_table(path: str) -> bool:
    """Whether a file of this name has columns."""
    return path.lower().endswith(_TABLES)


def _has_columns(source: str | FastaPair | SplitFiles) -> bool:
    """Whether every file of a source is a table."""
    if isinstance(source, SplitFiles):
        return all(map(is_table, (source.training, source.validation, source.test)))
    return isinstance(source, str) and is_table(source)


class DataSettings(Table):
    """Where sequences come from and how they are split."""

    source: Annotated[
        Annotated[str, AfterValidator(_check_source), Tag("text")]
        | Annotated[FastaPair, Tag("pair")]
        | Annotated[SplitFiles, Tag("files")],
        Discriminator(_source_kind),
    ]
    """"solubility", "synthetic", a path (.npz .csv .tsv .csv.gz .tsv.gz), two FASTA files, or
    three files of a given split"""
    fallback: Literal["synthetic"] | None = None
    """what to use, loudly, where "solubility" cannot be had"""
    max_length: int = Field(default=200, ge=1, le=100_000)
    """residues"""
    truncate: Annotated[Truncate | None, BeforeValidator(_cut_from_truth)] = None
    """where longer sequences are cut: "end", "start" or "middle"; otherwise they are an error"""
    unknown: Unknown = "error"
    """letters that are not residues (X B Z U O J ?): "error", or "mask" to leave them out"""
    conflicts: Conflicts = "error"
    """sequences that have both labels: "error", or "drop" to leave all rows of them out"""
    columns: ColumnSettings = ColumnSettings()
    """of a CSV or TSV file"""
    split: SplitSettings = Field(default=SplitSettings(), validate_default=True)

    @field_validator("columns")
    @classmethod
    def _name_columns_of_a_table(
        cls, columns: ColumnSettings, info: ValidationInfo
    ) -> ColumnSettings:
        source = info.data.get("source", _TABLES[0])  # a wrong source is told itself
        if columns != ColumnSettings() and not _has_columns(source):
            raise _wrong("are those of a .csv or .tsv file, and source is another; leave them out")
        return columns

    @field_validator("split")
    @classmethod
    def _split_what_the_source_has(
        cls, split: SplitSettings, info: ValidationInfo
    ) -> SplitSettings:
        source = info.data.get("source")  # None: wrong, which is told itself
        columns = info.data.get("columns", ColumnSettings())
        if source is None:
            return split
        if isinstance(source, SplitFiles):
            if split.rule != "given":
                raise _wrong(
                    'source names three files, which are the split; write rule = "given" in '
                    "[data.split]"
                )
            if split.column is not None:
                raise _wrong("has a column, but source names a file for each part; leave it out")
        elif split.rule == "given" and split.column is None:
            raise _wrong(
                'has rule = "given" and no column; write column = "...", whose values are '
                "training, validation and test, or name three files: source = "
                '{ training = "a.csv", validation = "b.csv", test = "c.csv" }'
            )
        for name in split.column_names.values():
            if not _has_columns(source):
                raise _wrong(
                    f"names the column {shown(name)}, and source is no .csv or .tsv file; name one"
                )
            for key in ("sequence", "label", "weight"):
                other = getattr(columns, key)
                if other is not None and column_key(other) == column_key(name):
                    raise _wrong(f"column {shown(name)} is that of {key}; name another column")
        if split.reshuffle and columns.weight is not None:
            raise _wrong(
                "has reshuffle, and columns has weight, which only training rows keep; leave one "
                "of the two out"
            )
        return split


class TrainingSettings(Table):
    """How one configuration is trained."""

    max_epochs: int = Field(default=27, ge=1, le=100_000)
    """epochs of a trial that is not pruned: Hyperband's R"""
    patience: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_none_from_word)] = 8
    """epochs without a better validation loss before a trial ends; "none": never"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the computation; weights are float32"""
    max_trial_seconds: float = Field(default=3600.0, gt=0)
    """a trial that trains longer is ended"""
    class_weights: ClassWeights = "none"
    """of the training loss: "balanced" lets both labels count the same in total"""
    as_trial: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """weights, shuffling and dropout are those of this trial number, in every trial"""

    def precision_alone(self) -> Precision:
        """What "auto" means where no study decides it (`TunedStudy.precision_of`): float32."""
        return "float32" if self.precision == "auto" else self.precision

    def seeded_as(self, trial: int) -> int:
        """The trial number that weights, shuffling and dropout of trial `trial` derive from."""
        return trial if self.as_trial is None else self.as_trial


class HyperbandSettings(Table):
    """Hyperband (arXiv:1603.06560); its R is `training.max_epochs`."""

    min_epochs: int = Field(default=1, ge=1, le=100_000)
    """no rung is after fewer epochs"""
    eta: int = Field(default=3, ge=2, le=1000)
    """one trial in eta goes on at a rung"""
    audit: float | None = Field(default=None, ge=0, le=1)
    """share of the trials to be pruned that are trained to their end all the same"""


class StopSettings(Table):
    """Ends the study before its budget is used up, as `tuner.search.stop_rule` says."""

    patience: int = Field(default=60, ge=1, le=1_000_000)
    """finished trials in a row without a better validation loss"""
    min_delta: float = Field(default=0.001, ge=0)
    """nats by which a better one must be better"""


NotifyEvent: TypeAlias = Literal["finished", "failed", "stopped"]
NOTIFY_VARIABLE = "TUNER_NOTIFY"  #: holds the URL of the webhook, unless a study names another


def _check_variable(name: str) -> str:
    # An uploaded study file must not send what other variables of the service hold. Neither is
    # what stands there repeated: it may be the URL itself, with its token.
    if not re.fullmatch(rf"{NOTIFY_VARIABLE}[A-Z0-9_]*", name, re.ASCII):
        raise _wrong(
            f"must name an environment variable that begins with {NOTIFY_VARIABLE} and holds the "
            f'URL of the webhook, such as "{NOTIFY_VARIABLE}_LAB"'
        )
    return name


def _check_events(events: list[NotifyEvent]) -> list[NotifyEvent]:
    if not events:
        raise _wrong("must name an event, of: finished, failed, stopped")
    return list(dict.fromkeys(events))


class NotifySettings(Table):
    """Notifies a webhook of how the study ended."""

    url_env: Annotated[str, AfterValidator(_check_variable)] = NOTIFY_VARIABLE
    """environment variable with the URL, which may hold a token"""
    on: Annotated[list[NotifyEvent], AfterValidator(_check_events)] = Field(
        default_factory=lambda: list(get_args(NotifyEvent))
    )
    """events of which it is notified"""


class ConfirmSettings(Table):
    """Trains the best configurations again once the search has ended (`tuner confirm`)."""

    top: int = Field(default=10, ge=1, le=1000)
    """configurations, the best first"""
    seeds: int = Field(default=5, ge=2, le=1000)
    """trainings of each, with a seed of its own"""


class SamplerSettings(Table):
    """How configurations are sampled."""

    kind: Literal["tpe", "random"] = "tpe"


class Settings(Table):
    """A study file without its space."""

    name: Annotated[str, AfterValidator(_check_name)]
    """the study's name, of which file names are made"""
    trials: int = Field(ge=1, le=1_000_000)
    """budget: finished trials, complete or pruned"""
    seed: Seed = 0
    """sampler, initial weights, shuffling and dropout derive from it"""
    data: DataSettings
    training: TrainingSettings = TrainingSettings()
    hyperband: HyperbandSettings | None = None
    """leave the table out for no pruning"""
    sampler: SamplerSettings = SamplerSettings()
    stop: StopSettings | None = None
    """leave the table out to use the whole budget"""
    notify: NotifySettings | None = None
    """leave the table out for the default: all events, if TUNER_NOTIFY is set"""
    confirm: ConfirmSettings | None = None
    """leave the table out to confirm nothing by itself"""
    provenance: Annotated[dict[str, Any], AfterValidator(_check_provenance)] | None = None
    """where an exported configuration comes from; its data is found again by the hash in there"""


class StudySpec(Settings):
    """A study file, checked and with every default filled in."""

    space: InstanceOf[SearchSpace]
    known: tuple[Mapping[str, Any], ...] = ()
    """sampled name -> `ParameterValue`, complete: ready for `enqueue_trial`"""
    folder: Path = Path()
    """where the study file lies: relative data paths start here"""
    made_with_rungs: tuple[int, ...] | None = None
    """of a study that was made with other rungs than its file would have today: it keeps them"""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Completed epochs after which Hyperband decides: below `max_epochs`, rising."""
        if self.hyperband is None:
            return ()
        if self.made_with_rungs is not None:
            return self.made_with_rungs
        return rungs(self.hyperband.min_epochs, self.training.max_epochs, self.hyperband.eta)

    @property
    def brackets(self) -> tuple[tuple[int, ...], ...]:
        """The rungs of each bracket, that which stops soonest first; none without Hyperband."""
        return tuple(self.rungs[first:] for first in range(self.bracket_count))

    @property
    def bracket_count(self) -> int:
        """s_max + 1 of the paper; 0 without Hyperband."""
        if self.hyperband is None:
            return 0
        return 1 + halvings(self.hyperband.min_epochs, self.training.max_epochs, self.hyperband.eta)

    @property
    def bracket_turns(self) -> tuple[int, ...]:
        """The bracket (an index of `brackets`) of each trial of a round; none without Hyperband."""
        if self.hyperband is None:
            return ()
        return bracket_turns(
            self.hyperband.min_epochs, self.training.max_epochs, self.hyperband.eta
        )

    def bracket_of(self, trial: int) -> int | None:
        """The bracket of the trial of this number: one round follows the other."""
        turns = self.bracket_turns
        return turns[trial % len(turns)] if turns else None

    def trials_of_brackets(self, trials: int) -> tuple[int, ...]:
        """How many of the first `trials` trials each bracket has."""
        turns = itertools.islice(itertools.cycle(self.bracket_turns), trials)
        counts = Counter(turns)
        return tuple(counts[bracket] for bracket in range(self.bracket_count))

    @property
    def planned_epochs(self) -> int:
        """Epochs the study is expected to train: of each bracket, 1/eta pass each rung.

        Early stopping and asynchronous promotion (a rung's first trials always pass) move it.
        """
        if self.hyperband is None:
            return self.trials * self.training.max_epochs
        total = 0.0
        trials_of_brackets = self.trials_of_brackets(self.trials)
        for bracket, trials in zip(self.brackets, trials_of_brackets, strict=True):
            alive, before = float(trials), 0
            for rung in (*bracket, self.training.max_epochs):
                total += alive * (rung - before)
                alive, before = alive / self.hyperband.eta, rung
        return round(total)

    @property
    def data_sha256(self) -> str | None:
        """The `DataIdentity.sha256` that an exported study file tells of; None of any other."""
        found = (self.provenance or {}).get("data") or {}
        sha256 = found.get("sha256") if isinstance(found, Mapping) else None
        return sha256 if isinstance(sha256, str) else None

    def to_document(self) -> dict[str, Any]:
        """The whole study file as plain values, every default written out.

        What is None has no key (TOML knows no null), but patience, whose default is a number.
        """
        document = self.model_dump(
            exclude={"space", "known", "folder", "made_with_rungs"}, exclude_none=True
        )
        document["training"].setdefault("patience", "none")
        document["space"] = self.space.to_document()
        document["known"] = [_nested(configuration) for configuration in self.known]
        return document

    def identity_document(self) -> dict[str, Any]:
        """What of the document makes the study what it is.

        Left out: its name and provenance; `trials`, `stop`, `notify` and `confirm`, which may be
        changed later; `data.fallback`, which decides whether there is a study at all; and the
        folders of data files, whose content has an identity of its own
        (`tuner.data.identity.DataIdentity`).
        """
        document = self.to_document()
        for key in ("name", "trials", "stop", "notify", "confirm", "provenance"):
            document.pop(key, None)
        document["data"].pop("fallback", None)
        document["data"]["source"] = _without_folders(document["data"]["source"])
        return document

    @property
    def spec_hash(self) -> str:
        """SHA-256 (hex) of `identity_document`, to be shown and written down with results.

        A version that adds a key computes another one of the same study file, so it does not
        decide whether two studies are one: their documents do.
        """
        text = json.dumps(self.identity_document(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def leaves_out(self, key: str) -> bool:
        """Whether the study file leaves out this dotted key of its settings, for the default."""
        table: Any = self
        for name in key.split("."):
            if not isinstance(table, BaseModel):
                return table is None
            if name not in table.model_fields_set:
                return True
            table = getattr(table, name)
        return False


def _nested(configuration: Mapping[str, ParameterValue]) -> dict[str, Any]:
    """{"block1.kernel_size": 5} -> {"block1": {"kernel_size": 5}}, as the file has it."""
    table: dict[str, Any] = {}
    for name, value in configuration.items():
        layer, _, key = name.rpartition(".")
        (table.setdefault(layer, {}) if layer else table)[key] = value
    return table


def _without_folders(source: Any) -> Any:
    if isinstance(source, Mapping):
        return {label: PurePath(path).name for label, path in source.items()}
    return PurePath(source).name
