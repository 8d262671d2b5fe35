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
    Tag,
    ValidationInfo,
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
Fraction: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
PathText: TypeAlias = Annotated[str, AfterValidator(_check_path)]
ColumnName: TypeAlias = Annotated[str, AfterValidator(_check_column)]
#: Where a sequence that is too long is cut, see `tuner.data.rows.truncated`.
Truncate: TypeAlias = Literal["end", "start", "middle"]
#: What becomes of a letter that is not one of the 20 residues.
Unknown: TypeAlias = Literal["error", "mask"]
#: What becomes of a sequence that has both labels.
Conflicts: TypeAlias = Literal["error", "drop"]
ClassWeights: TypeAlias = Literal["none", "balanced"]


class SplitSettings(Table):
    """How rows are divided into training, validation and test."""

    rule: Literal["random"] = "random"
    """by the hash of seed and sequence, stratified by label"""
    seed: Seed = 0
    """another seed, another split"""
    validation: Fraction = 0.1
    """fraction of the rows that choose hyperparameters"""
    test: Fraction = 0.1
    """fraction of the rows that stay sealed until the report"""

    @model_validator(mode="after")
    def _leave_training_rows(self) -> SplitSettings:
        if self.validation + self.test >= 1:
            raise _wrong(
                f"validation = {self.validation} and test = {self.test} leave nothing to train on; "
                "their sum must be below 1",
                "validation",
                "test",
            )
        return self


class FastaPair(Table):
    """Two FASTA files, one for each label."""

    soluble: PathText
    """path of the soluble sequences"""
    insoluble: PathText
    """path of the insoluble sequences"""


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
    return "pair" if isinstance(value, Mapping | FastaPair) else "text"


class DataSettings(Table):
    """Where sequences come from and how they are split."""

    source: Annotated[
        Annotated[str, AfterValidator(_check_source), Tag("text")]
        | Annotated[FastaPair, Tag("pair")],
        Discriminator(_source_kind),
    ]
    """"solubility", "synthetic", a path (.npz .csv .tsv .csv.gz .tsv.gz), or two FASTA files"""
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
    split: SplitSettings = SplitSettings()

    @field_validator("columns")
    @classmethod
    def _name_columns_of_a_table(
        cls, columns: ColumnSettings, info: ValidationInfo
    ) -> ColumnSettings:
        source = info.data.get("source", _TABLES[0])  # a wrong source is told itself
        is_table = isinstance(source, str) and source.lower().endswith(_TABLES)
        if columns != ColumnSettings() and not is_table:
            raise _wrong("are those of a .csv or .tsv file, and source is another; leave them out")
        return columns


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

        Left out: its name and provenance; `trials`, `stop` and `notify`, which may be changed
        later; `data.fallback`, which decides whether there is a study at all; and the folders of
        data files, whose content has an identity of its own (`tuner.data.identity.DataIdentity`).
        """
        document = self.to_document()
        for key in ("name", "trials", "stop", "notify", "provenance"):
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
