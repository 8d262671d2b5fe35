"""Study files: `studies/*.toml` -> `StudySpec`, with every mistake reported at once."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from tuner.errors import SpecError
from tuner.spec.document import (
    Mistake,
    Places,
    did_you_mean,
    one_of,
    read_file,
    shown,
    without_the_quotes,
)
from tuner.spec.limits import excess, odd_text
from tuner.spec.precision import Precision
from tuner.spec.space import KEYS, ParameterValue, SearchSpace
from tuner.spec.tables import (
    check_lengths,
    known_schema,
    read_known,
    read_space,
    space_schema,
)
from tuner.spec.toml_lines import KeyPath

MAX_NAME_LENGTH = 80  # characters; with "-synthetic" and a suffix still a file name everywhere
_MAX_NAME_BYTES = 160  #: the same in UTF-8, of which a file's name has at most 255 in all
_SUFFIXES = (".npz", ".csv", ".tsv")
#: For the JSON schema: the greater part of `name_problem`.
_NAME_PATTERN = r'^[^\s.\-/\\:*?"<>|][^/\\:*?"<>|\u0000-\u001f]*$'


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
        return f"must not contain {listed}, as {shown(name)} does; use letters, digits, - _ and ."
    if name[0] in ".-" or name[-1] == ".":
        return f"must not begin with . or -, or end with ., as {shown(name)} does"
    return None


def _prints(letter: str) -> bool:
    return letter.isprintable()


# The settings. The attributes' defaults are the file's.


class _Table(BaseModel):
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
            'must be "solubility", "synthetic", a path that ends in .npz, .csv or .tsv, or '
            f'{{ soluble = "a.fasta", insoluble = "b.fasta" }}, not {shown(source)}'
            + did_you_mean(source, ("solubility", "synthetic"))
        )
    return source


def _none_from_word(value: object) -> object:
    return None if value == "none" else value


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


class SplitSettings(_Table):
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


class FastaPair(_Table):
    """Two FASTA files, one for each label."""

    soluble: PathText
    """path of the soluble sequences"""
    insoluble: PathText
    """path of the insoluble sequences"""


def _source_kind(value: object) -> str:
    return "pair" if isinstance(value, Mapping | FastaPair) else "text"


class DataSettings(_Table):
    """Where sequences come from and how they are split."""

    source: Annotated[
        Annotated[str, AfterValidator(_check_source), Tag("text")]
        | Annotated[FastaPair, Tag("pair")],
        Discriminator(_source_kind),
    ]
    """"solubility", "synthetic", a path (.npz .csv .tsv), or two FASTA files"""
    fallback: Literal["synthetic"] | None = None
    """what to use, loudly, where "solubility" cannot be had"""
    max_length: int = Field(default=200, ge=1, le=100_000)
    """residues"""
    truncate: bool = False
    """cut longer sequences off; otherwise they are an error"""
    split: SplitSettings = SplitSettings()


class TrainingSettings(_Table):
    """How one configuration is trained."""

    max_epochs: int = Field(default=27, ge=1, le=100_000)
    """epochs of a trial that is not pruned: Hyperband's R"""
    patience: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_none_from_word)] = 8
    """epochs without a better validation loss before a trial ends; "none": never"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the computation; weights are float32"""
    max_trial_seconds: float = Field(default=3600.0, gt=0)
    """a trial that trains longer is ended"""
    as_trial: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """weights, shuffling and dropout are those of this trial number, in every trial"""

    def precision_alone(self) -> Precision:
        """What "auto" means where no study decides it (`TunedStudy.precision_of`): float32."""
        return "float32" if self.precision == "auto" else self.precision

    def seeded_as(self, trial: int) -> int:
        """The trial number that weights, shuffling and dropout of trial `trial` derive from."""
        return trial if self.as_trial is None else self.as_trial


class HyperbandSettings(_Table):
    """Hyperband (arXiv:1603.06560); its R is `training.max_epochs`."""

    min_epochs: int = Field(default=1, ge=1, le=100_000)
    """no rung is after fewer epochs"""
    eta: int = Field(default=3, ge=2, le=1000)
    """one trial in eta goes on at a rung"""


class StopSettings(_Table):
    """Ends the study before its budget is used up, as `tuner.search.stop_rule` says."""

    patience: int = Field(default=60, ge=1, le=1_000_000)
    """finished trials in a row without a better validation loss"""
    min_delta: float = Field(default=0.001, ge=0)
    """nats by which a better one must be better"""


class SamplerSettings(_Table):
    """How configurations are sampled."""

    kind: Literal["tpe", "random"] = "tpe"


class _Settings(_Table):
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
    provenance: Annotated[dict[str, Any], AfterValidator(_check_provenance)] | None = None
    """where an exported configuration comes from; its data is found again by the hash in there"""


class StudySpec(_Settings):
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
        return 1 + _halvings(
            self.hyperband.min_epochs, self.training.max_epochs, self.hyperband.eta
        )

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

    @property
    def spec_hash(self) -> str:
        """SHA-256 (hex) of what makes the study what it is.

        Left out: its name and provenance; `trials` and `stop`, which may be changed later;
        `data.fallback`, which decides whether there is a study at all; and the folders of data
        files, whose content has an identity of its own (`tuner.data.identity.DataIdentity`).
        """
        document = self.to_document()
        del document["name"], document["trials"]
        for key in ("stop", "provenance"):
            document.pop(key, None)
        document["data"].pop("fallback", None)
        document["data"]["source"] = _without_folders(document["data"]["source"])
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def rungs(min_epochs: int, max_epochs: int, eta: int) -> tuple[int, ...]:
    """The rungs of the bracket that stops soonest (arXiv:1603.06560, algorithm 1), rising.

    They are `max_epochs * eta**-k` with k = s_max .. 1, each rounded to the nearest whole epoch,
    halves up: for R = 100 and eta = 4 after 2 (1.56), 6 (6.25) and 25 epochs. None is below
    `min_epochs`, and none is `max_epochs`: a fully trained trial meets no rung at its end.
    """
    divisors = (eta**k for k in range(_halvings(min_epochs, max_epochs, eta), 0, -1))
    return tuple((2 * max_epochs + divisor) // (2 * divisor) for divisor in divisors)


def rungs_counted_up(min_epochs: int, max_epochs: int, eta: int) -> tuple[int, ...]:
    """`min_epochs * eta**k` below `max_epochs`, the rungs of studies that recorded none.

    The same as `rungs` where `max_epochs / min_epochs` is a power of `eta`. Elsewhere there may
    be one more, which the bracket that should never stop has, too.
    """
    found: list[int] = []
    epochs = min_epochs
    while epochs < max_epochs:
        found.append(epochs)
        epochs *= eta
    return tuple(found)


def brackets(min_epochs: int, max_epochs: int, eta: int) -> tuple[tuple[int, ...], ...]:
    """The rungs of every bracket (arXiv:1603.06560, algorithm 1); the last has none.

    Each begins a rung later than the one before, and all end at `max_epochs`.
    """
    all_rungs = rungs(min_epochs, max_epochs, eta)
    return tuple(all_rungs[first:] for first in range(len(all_rungs) + 1))


def _halvings(min_epochs: int, max_epochs: int, eta: int) -> int:
    """s_max of the paper, floor(log_eta(max_epochs / min_epochs)), counted in integers."""
    count = 0
    while min_epochs * eta ** (count + 1) <= max_epochs:
        count += 1
    return count


@functools.cache  # asked for every trial
def bracket_turns(min_epochs: int, max_epochs: int, eta: int) -> tuple[int, ...]:
    """The bracket of each trial of a round, that which stops soonest first.

    As in the paper (arXiv:1603.06560, algorithm 1) one follows when the one before has all its
    trials, of `count` brackets ceil(eta^s / (s + 1)) with s from count - 1 down to 0, so 7, 3, 2
    and 1 of four with eta 3. That is the paper's n for a budget B of R epochs a bracket; with
    B = count * R a round is `count` times as long, and many a study would end in its first bracket.
    """
    count = 1 + _halvings(min_epochs, max_epochs, eta)
    return tuple(
        bracket
        for bracket, s in enumerate(reversed(range(count)))
        for _ in range(-(-(eta**s) // (s + 1)))
    )


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


# Reading.


def load_spec(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """The study file at `path`.

    Args:
        path: A TOML file; an exported one may be JSON or YAML, by its suffix.
        overrides: What `--set` was given: "key=value", the value as TOML ("data.split.seed=1",
            "space.filters={ choices = [16, 32] }"); what is no TOML value is text. Later ones
            win, and a table replaces a table.

    Raises:
        SpecError: With all mistakes of the file and the overrides.
    """
    document, places, problems = read_file(path, overrides)
    spec, mistakes = _check(document, path.parent.absolute())
    found = map(places.problem, mistakes)
    problems += sorted(found, key=lambda problem: (problem.line is None, problem.line))
    if problems or spec is None:
        raise SpecError(problems)
    return spec


def spec_from_document(document: Mapping[str, Any], *, folder: Path = Path()) -> StudySpec:
    """The spec behind `StudySpec.to_document`.

    Raises:
        SpecError: With all mistakes.
    """
    spec, mistakes = _check(document, folder)
    if spec is None:
        raise SpecError([Places("", {}, ()).problem(mistake) for mistake in mistakes])
    return spec


# Checking.

_EXAMPLES = {
    "name": 'name = "my-study"',
    "trials": "trials = 20",
    "data": '[data] with source = "solubility"',
    "source": 'source = "solubility"',
    "soluble": 'soluble = "soluble.fasta"',
    "insoluble": 'insoluble = "insoluble.fasta"',
}

#: Which keys stand in which table ("": at the top of the file).
_TABLES: Mapping[str, tuple[str, ...]] = {
    "": (*_Settings.model_fields, "space", "known"),
    "data": tuple(DataSettings.model_fields),
    "data.split": tuple(SplitSettings.model_fields),
    "data.source": tuple(FastaPair.model_fields),
    "training": tuple(TrainingSettings.model_fields),
    "hyperband": tuple(HyperbandSettings.model_fields),
    "sampler": tuple(SamplerSettings.model_fields),
    "stop": tuple(StopSettings.model_fields),
    "space": tuple(KEYS),
}

#: Keys that decide how many positions are left.
_LENGTH_KEYS = frozenset(
    ("blocks", "kernel_size", "pool_size", "padding", "arrangement", "head", "masking")
)


def _check(document: Mapping[str, Any], folder: Path) -> tuple[StudySpec | None, Sequence[Mistake]]:
    """The spec, or None and what is wrong."""
    if message := excess(document):
        return None, [Mistake(path=(), value=None, message=message)]
    odd = [
        Mistake(path=path, value=value, message=text) for path, value, text in odd_text(document)
    ]
    if odd:
        return None, odd
    mistakes: list[Mistake] = []
    settings = None
    try:
        settings = _Settings.model_validate(
            {key: value for key, value in document.items() if key not in ("space", "known")}
        )
    except ValidationError as error:
        mistakes += [_mistake(details) for details in error.errors(include_url=False)]
    mistakes += _check_hyperband(document, mistakes)
    in_space: list[Mistake] = []
    space = read_space(document.get("space", {}), in_space)
    mistaken = KEYS.keys() & {name for mistake in in_space for name in mistake.path}
    max_length = _valid(document, ("data", "max_length"), mistakes, DataSettings)
    if isinstance(max_length, int) and not mistaken & _LENGTH_KEYS:
        check_lengths(space, max_length, in_space)
    mistakes += [_with_home(mistake) for mistake in in_space]
    known = read_known(document.get("known", []), space, mistakes, mistaken)
    if mistakes or settings is None:
        return None, mistakes
    return StudySpec(**dict(settings), space=space, known=known, folder=folder), ()


def _valid(
    document: Mapping[str, Any], path: tuple[str, str], mistakes: Sequence[Mistake], table: Any
) -> Any:
    """The value at `path`, or its default; None where it is mistaken."""
    if any(mistake.path in (path[:1], path) for mistake in mistakes):
        return None
    return (document.get(path[0]) or {}).get(path[1], table.model_fields[path[1]].default)


def _check_hyperband(document: Mapping[str, Any], mistakes: Sequence[Mistake]) -> Iterator[Mistake]:
    if document.get("hyperband") is None:
        return
    min_epochs = _valid(document, ("hyperband", "min_epochs"), mistakes, HyperbandSettings)
    max_epochs = _valid(document, ("training", "max_epochs"), mistakes, TrainingSettings)
    if min_epochs is not None and max_epochs is not None and min_epochs > max_epochs:
        yield Mistake(
            path=("hyperband", "min_epochs"),
            value=min_epochs,
            message=f"min_epochs = {min_epochs} is above training.max_epochs = {max_epochs}, so "
            "there is no bracket; lower the one or raise the other",
            also=(("training", "max_epochs"),),
        )


def _mistake(error: ErrorDetails) -> Mistake:
    path = error["loc"]
    if path[:2] == ("data", "source") and len(path) > 2:
        path = (*path[:2], *path[3:])  # without pydantic's tag of the union
    value = None if error["type"] == "missing" else error["input"]
    context = error.get("ctx", {})
    also = tuple((*path, key) for key in str(context.get("keys", "")).split())
    return Mistake(path=path, value=value, message=_message(error, path), also=also)


def _message(error: ErrorDetails, path: KeyPath) -> str:
    """What pydantic found, in our words: what must be, what is, what to write."""
    value, context, key = error["input"], error.get("ctx", {}), str(path[-1])
    if error["type"] == "mistake":
        return str(context["message"])
    if error["type"] == "missing":
        return f"is missing; write {_EXAMPLES.get(key, f'{key} = ...')}"
    if error["type"] == "extra_forbidden":
        return _unknown_key(path)
    if error["type"] == "literal_error":
        return one_of(_literals(path), value)
    what = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text in quotes",
        "model_type": f"a table ([{'.'.join(map(str, path))}])",
        "greater_than_equal": f"at least {context.get('ge')}",
        "greater_than": f"above {context.get('gt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "less_than": f"below {context.get('lt')}",
    }.get(error["type"])
    if what is None:
        return f"{error['msg']}, not {shown(value)}"
    if key == "patience" and error["type"] == "int_type":
        what += ' or "none"'
    return f"must be {what}, not {shown(value)}{without_the_quotes(value)}"


def _literals(path: KeyPath) -> tuple[str, ...]:
    """The allowed words of the field at `path`."""
    model: Any = _Settings
    for name in path[:-1]:
        model = _table_of(model.model_fields[name].annotation)
    annotation = model.model_fields[path[-1]].annotation
    options = [annotation, *get_args(annotation)]
    return next(get_args(option) for option in options if get_origin(option) is Literal)


def _table_of(annotation: Any) -> Any:
    tables = [option for option in (annotation, *get_args(annotation)) if _is_table(option)]
    return tables[0]


def _is_table(option: object) -> bool:
    return isinstance(option, type) and issubclass(option, _Table)


def _unknown_key(path: KeyPath) -> str:
    table, name = ".".join(map(str, path[:-1])), str(path[-1])
    where = f" in [{table}]" if table else ""
    if home := _home(name, table):
        return f"unknown key {shown(name)}{where}; it belongs {home}"
    known = _TABLES[table]
    near = did_you_mean(name, known) or f"; known are {', '.join(known)}"
    return f"unknown key {shown(name)}{where}{near}"


def _home(name: str, table: str) -> str:
    """Where a key belongs that stands in the wrong table; '' where it is known nowhere else."""
    for other, keys in _TABLES.items():
        if name in keys and other != table:
            return f"in [{other}]" if other else "at the top of the file, before the first [table]"
    return ""


def _with_home(mistake: Mistake) -> Mistake:
    """The mistake; a key that TOML counts to [space] because it stands below it is sent home."""
    if len(mistake.path) != 2 or not mistake.message.startswith("unknown key"):
        return mistake
    name = str(mistake.path[1])
    home = _home(name, "space")
    message = f"unknown key {shown(name)} in [space]; it belongs {home}"
    return replace(mistake, message=message) if home else mistake


# The JSON schema.


def json_schema() -> dict[str, Any]:
    """The JSON schema of a study file, for editors (`tuner check --schema`)."""
    schema = _without_null(_Settings.model_json_schema(by_alias=False))
    schema["properties"] |= {"space": space_schema(), "known": known_schema()}
    patience = schema["$defs"]["TrainingSettings"]["properties"]["patience"]
    patience["anyOf"] = [{"type": patience.pop("type"), "minimum": patience.pop("minimum")}]
    patience["anyOf"].append({"const": "none"})
    text = {"type": "string", "minLength": 1}
    schema["properties"]["name"] |= text | {"maxLength": MAX_NAME_LENGTH, "pattern": _NAME_PATTERN}
    source = schema["$defs"]["DataSettings"]["properties"]["source"]
    source["anyOf"] = [
        {
            "type": "string",
            "pattern": r"^(solubility|synthetic|.*\.[nN][pP][zZ]|.*\.[cCtT][sS][vV])$",
        },
        {"$ref": "#/$defs/FastaPair"},
    ]
    source.pop("oneOf", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Study file of the tuner",
        "description": "A fixed hyperparameter is a bare value, a searched one a table.",
    }


def _without_null(schema: Any) -> Any:
    """The schema without what stands for None: TOML knows no null, one leaves the key out."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    cleaned = {key: _without_null(value) for key, value in schema.items()}
    if cleaned.get("default", ...) is None:
        del cleaned["default"]
    options = [option for option in cleaned.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        del cleaned["anyOf"]
        cleaned |= options[0]
    return cleaned
