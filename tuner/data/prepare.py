"""Where the data comes from, what it must look like, and how it is split and sealed.

A study's source is read once, by `prepare`: every row is checked, the rows are split, and a
*development file* with the training and validation rows alone is written under the artifacts
folder. Whatever trains gets that file and never the source. `read_held_out` returns the test
rows; `tuner.results.heldout` alone calls it, after it has written the ledger.

All formats become the same rows (a sequence and a label), and split and development file depend
on those rows alone: not on the file, its format or the order of its rows.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import io
import itertools
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tuner.artifacts import development_path, publish
from tuner.errors import DataError, Problem, TunerError, counted
from tuner.metrics import small_split_warnings

if TYPE_CHECKING:
    from tuner.spec.spec import DataSettings, FastaPair, SplitSettings

Tokens = npt.NDArray[np.uint8]

#: Token 1 is the first of these, token 20 the last; token 0 pads at the end.
RESIDUES = "ARNDCQEGHILKMFPSTWYV"

SOLUBILITY_URL = "https://github.com/whitead/dmol-book/raw/main/data/solubility.npz"
SOLUBILITY_SHA256 = "37b2e198e5d28a7468c67d7599c88f4ab4c37d8d2481be7fb314f40caeaf085d"
SOLUBILITY_FILE = "solubility.npz"
CONNECT_SECONDS = 5
READ_SECONDS = 30  # of silence in the middle of a download

SHOWN_PROBLEMS = 5  # of one kind, each with its place; the rest are counted
SHOWN_VALUES = 10  # different wrong values of one kind, the most frequent first
SHOWN_POSITIONS = 5  # of one wrong letter in one sequence
MINIMUM_ROWS = 10  # of each label: below that a split of 10 % is a coin toss
SHOWN_CHARACTERS = 40  # of a wrong value
NUCLEOTIDES = "ACGTUN"  # letters of DNA and RNA; all but U are residues, too
#: A shorter sequence of nucleotide letters alone may be a peptide.
NUCLEOTIDE_LENGTH = 10

_ARRAYS = (("positives", 1), ("negatives", 0))
_NOT_A_RESIDUE = re.compile(f"[^{RESIDUES}{RESIDUES.lower()}]")
_ONLY_NUCLEOTIDES = re.compile(f"[{NUCLEOTIDES}]+", re.IGNORECASE | re.ASCII)
_LINE_END = re.compile(r"\r\n|\r|\n")
#: Python's own limit of 131,072 letters would refuse long text in a column that is ignored.
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DataIdentity:
    """What a study was trained on: enough to tell whether two studies can be compared."""

    source: str  #: "solubility", "synthetic", or the file name(s) as the study file gives them
    synthetic: bool  #: the rows were generated (`synthetic_sequences`), not measured
    sha256: str  #: of the source's bytes; of both digests (FASTA pair); of the rows (synthetic)
    split_id: str  #: sha256 of the sorted sequence hashes of the test rows
    split_seed: int
    max_length: int  #: residues; the width of the token arrays
    training_rows: int
    validation_rows: int
    test_rows: int

    def to_document(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def check_document(self) -> dict[str, Any]:
        """The same for whoever checks a study file: `tuner check --json` and the dashboard."""
        return {
            "source": self.source,
            "synthetic": self.synthetic,
            "sha256": self.sha256,
            "split_id": self.split_id,
            "rows": {
                "train": self.training_rows,
                "validation": self.validation_rows,
                "test": self.test_rows,
            },
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> DataIdentity:
        """The identity that `to_document` wrote."""
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitHashes:
    """Which sequences are in which split, as the SHA-256 of each, in upper case and uncut.

    Enough to find them in another study's splits; labels are not in it.
    """

    training: frozenset[bytes]
    validation: frozenset[bytes]
    test: frozenset[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A source that was read, checked, split and sealed."""

    identity: DataIdentity
    development_file: Path  #: artifacts/development/<development_sha256>.npz
    development_sha256: str  #: of the development file's bytes
    warnings: tuple[str, ...]  #: one sentence each: what was accepted, and how often
    loud: tuple[str, ...] = ()  #: those of `warnings` that put every result in doubt
    hashes: SplitHashes | None = None  #: None where the source was not read

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """`warnings`, and those of splits on which chance is too large."""
        identity = self.identity
        small = small_split_warnings(identity.validation_rows, identity.test_rows)
        return self.warnings + small


@dataclass(frozen=True, slots=True, kw_only=True)
class DevelopmentData:
    """The rows that training and the choice of hyperparameters may see."""

    training_tokens: Tokens  #: [training rows, max_length]
    training_labels: Tokens  #: [training rows]; 1 is soluble, 0 insoluble
    validation_tokens: Tokens  #: [validation rows, max_length]
    validation_labels: Tokens  #: [validation rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRows:
    """The sealed test split."""

    tokens: Tokens  #: [test rows, max_length]
    labels: Tokens  #: [test rows]; 1 is soluble, 0 insoluble
    hashes: frozenset[bytes] = frozenset()  #: of their sequences, see `SplitHashes`


def prepare(
    settings: DataSettings, *, folder: Path, artifacts: Path, sha256: str | None = None
) -> Prepared:
    """Reads the source once, checks and splits it, and writes the development file.

    Args:
        settings: The study file's `[data]`.
        folder: Where the study file lies; relative paths start here.
        artifacts: The development file goes to `development/` under it.
        sha256: Of the source, where the study file tells it (an exported one does): a source that
            is missing is then looked for in `folder` under any name, and one of another content
            is warned of.

    Raises:
        DataError: The source cannot be used; lists every problem found.
        TunerError: The development file cannot be written.
    """
    there = _beside_the_study_file(settings, folder, sha256)
    source = _read_source(there or settings, folder)
    if there is not None:
        source = replace(source, name=", ".join(_names(settings)))
    split = _split(source, settings.split)
    training_tokens, training_labels = _arrays(split.training, settings.max_length)
    validation_tokens, validation_labels = _arrays(split.validation, settings.max_length)
    content = _npz(
        {
            "training_tokens": training_tokens,
            "training_labels": training_labels,
            "validation_tokens": validation_tokens,
            "validation_labels": validation_labels,
        }
    )
    development_sha256 = hashlib.sha256(content).hexdigest()
    development_file = development_path(artifacts, development_sha256)
    _write_development(development_file, content)
    return Prepared(
        identity=_identity(source, split, settings),
        development_file=development_file,
        development_sha256=development_sha256,
        warnings=(*source.warnings, *_warn_of_another_source(there, source, sha256)),
        loud=source.loud,
        hashes=_hashes(split),
    )


def read_hashes(settings: DataSettings, *, folder: Path) -> tuple[DataIdentity, SplitHashes]:
    """Which sequences a source has in which split; nothing is written.

    Raises:
        DataError: The source cannot be used; lists every problem found.
    """
    source = _read_source(settings, folder)
    split = _split(source, settings.split)
    return _identity(source, split, settings), _hashes(split)


def development_hashes(development: DevelopmentData) -> SplitHashes:
    """The same of a development file: its test split is empty, and cut sequences are cut."""
    training, validation = (
        frozenset(hash_sequence(sequence) for sequence in _decode(tokens))
        for tokens in (development.training_tokens, development.validation_tokens)
    )
    return SplitHashes(training=training, validation=validation, test=frozenset())


def hash_sequence(sequence: str) -> bytes:
    """The SHA-256 of a sequence, upper case: 32 bytes."""
    return hashlib.sha256(sequence.encode()).digest()


def load_development(path: Path, sha256: str | None = None) -> DevelopmentData:
    """The rows of a development file.

    Args:
        path: What `prepare` wrote, or a copy of it.
        sha256: Of the file's bytes, checked where given.

    Raises:
        DataError: The file is missing, damaged, or not the one that was asked for.
        OSError: It cannot be opened or read.
        MemoryError: There is no room for it.
    """
    remedy = "launch the study again: that writes the file anew"
    problems = _Problems()
    content = _read_bytes(path, str(path), problems, outages=True)
    problems.raise_if_any()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        problems.add(str(path), f"sha256 is {found}, not {sha256}; {remedy}", value=found)
        problems.raise_if_any()
    try:
        with _archive(content) as archive:
            development = DevelopmentData(
                training_tokens=_member(archive, "training_tokens"),
                training_labels=_member(archive, "training_labels"),
                validation_tokens=_member(archive, "validation_tokens"),
                validation_labels=_member(archive, "validation_labels"),
            )
    except (KeyError, _DamagedError) as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        problems.add(str(path), f"is no development file ({error}); {remedy}")
        problems.raise_if_any()
    return development


def read_held_out(settings: DataSettings, *, folder: Path) -> tuple[DataIdentity, HeldOutRows]:
    """The test rows, read from the source again. Only `tuner.results.heldout` may call this.

    The caller compares the identity with the study's: the source may have changed since.

    Raises:
        DataError: The source cannot be used; lists every problem found.
    """
    source = _read_source(settings, folder)
    split = _split(source, settings.split)
    tokens, labels = _arrays(split.test, settings.max_length)
    rows = HeldOutRows(tokens=tokens, labels=labels, hashes=_hashes(split).test)
    return _identity(source, split, settings), rows


def encode(sequences: Sequence[str], max_length: int) -> Tokens:
    """Tokens, uint8 [n, max_length]; 0 pads at the end, 1-20 are `RESIDUES`.

    Lower case counts as upper case.

    Raises:
        ValueError: A sequence is longer than `max_length` or holds something else.
    """
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    if lengths.max(initial=0) > max_length:
        raise ValueError(f"{lengths.max()} residues do not fit into max_length = {max_length}")
    codes = np.frombuffer("".join(sequences).encode("ascii", "replace"), dtype=np.uint8)
    flat = _TOKEN_OF_CODE[codes]
    if not flat.all():
        raise ValueError(f"{chr(codes[flat.argmin()])!r} is not one of {RESIDUES}")
    tokens = np.zeros((len(sequences), max_length), dtype=np.uint8)
    tokens[np.arange(max_length) < lengths[:, np.newaxis]] = flat
    return tokens


def _decode(tokens: Tokens) -> list[str]:
    """The sequences of tokens [n, max_length], without their padding."""
    letters = np.frombuffer(f" {RESIDUES}".encode(), dtype=np.uint8)[tokens]
    return [row.tobytes().decode().rstrip() for row in letters]


def _token_of_code() -> Tokens:
    """Token of each ASCII code, uint8 [256]; 0 where it is no residue."""
    table = np.zeros(256, dtype=np.uint8)
    for token, residue in enumerate(RESIDUES, start=1):
        table[ord(residue)] = table[ord(residue.lower())] = token
    return table


_TOKEN_OF_CODE = _token_of_code()


# --- rows and problems ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One protein, and where it stands in the user's files."""

    sequence: str  #: upper case, only `RESIDUES`
    label: int  #: 1 is soluble, 0 insoluble
    file: str
    line: int | None  #: 1-based; of the header in FASTA; None in npz
    place: str  #: for messages: "line 12", "row 3 of positives"
    whole: str | None = None  #: all of a sequence that was cut


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A source whose rows passed every check."""

    name: str
    synthetic: bool
    sha256: str
    rows: tuple[_Row, ...]
    warnings: tuple[str, ...]
    loud: tuple[str, ...] = ()  #: those of `warnings` that put every result in doubt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What many rows can have wrong with them: told once for all rows of a file."""

    several: str  #: the rows, in the plural
    remedy: str


_WRONG_LABEL = _Kind(
    several="labels that are neither 1 nor 0", remedy="write 1 (soluble) or 0 (insoluble)"
)
_WRONG_RESIDUE = _Kind(
    several="sequences with letters that are not residues",
    remedy=f"only {RESIDUES} can be used (20 residues, one letter each): correct or remove it",
)
_RNA = _Kind(
    several="sequences that look like RNA (letters ACGTUN alone)",
    remedy=f"only {RESIDUES} can be used: translate RNA into amino acids",
)
_EMPTY = _Kind(several="empty sequences", remedy="remove it, or add its residues")
_WRONG_FIELDS = _Kind(several="rows with too few or too many fields", remedy="correct the row")
_SEVERAL_LINES = _Kind(
    several="quoted fields that run over lines and may hold rows of the file",
    remedy="close or remove the quote, or write the field on one line",
)
_SEVERAL_LINES_TSV = _Kind(
    several="quoted fields that run over lines, where a TSV record is one line",
    remedy="close or remove the quote, or write the field on one line",
)
_NO_ID = _Kind(several="headers without an id", remedy="write >NAME")
_REPEATED_ID = _Kind(
    several="ids that stand in an earlier line already", remedy="rename or remove one of the two"
)
_BOTH_LABELS = _Kind(
    several="sequences that have the other label in an earlier row",
    remedy="remove one of the two, or both",
)
_WRONG_TOKEN = _Kind(several="rows with impossible tokens", remedy="write 0 to 20")
_PADDING_INSIDE = _Kind(
    several="rows with padding (0) inside the sequence", remedy="padding stands at the end only"
)
_NO_TOKENS = _Kind(several="rows that are empty sequences", remedy="remove it")


@dataclass(slots=True, kw_only=True)
class _Group:
    """The problems of one kind in one column of one file."""

    first: Problem
    kind: _Kind
    count: int = 0
    shown: list[str] = field(default_factory=list)  #: place and detail of the first ones
    values: Counter[str] = field(
        default_factory=Counter
    )  #: how often each wrong value stands there

    def problem(self) -> Problem:
        """The first of them, or one that speaks for all."""
        if self.count == 1:
            return self.first
        message = f"{self.count:,} {self.kind.several}: {', '.join(self.shown)}"
        if self.count > len(self.shown):
            message += f" and {self.count - len(self.shown):,} more"
            values = self.values.most_common(SHOWN_VALUES)
            if values:
                listed = ", ".join(f"{value} {_times(count)}" for value, count in values)
                others = len(self.values) - len(values)
                message += f"; in all {listed}" + (f", and {others:,} others" if others else "")
        return replace(self.first, count=self.count, message=f"{message}; {self.kind.remedy}")


def _times(count: int) -> str:
    return "once" if count == 1 else counted(count, "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refused:
    """A row that is left out for one reason, and may also be too long."""

    file: str
    line: int | None  #: as in `_Row`, like `place`
    place: str
    sequence: str  #: as it stands in the file; in npz with "-" for impossible tokens


class _Problems:
    """Collects what is wrong with a source, to be reported at once."""

    def __init__(self) -> None:
        self._listed: list[Problem | _Group] = []
        self._groups: dict[tuple[str, str, _Kind], _Group] = {}
        self.refused: list[_Refused] = []  #: whether they are too long is told nevertheless

    def __bool__(self) -> bool:
        return bool(self._listed)

    def add(
        self, file: str, message: str, *, line: int | None = None, key: str = "", value: str = ""
    ) -> None:
        """Lists a problem that stands for itself."""
        self._listed.append(
            Problem(file=file, line=line, key=key, value=_shorten(value), message=message)
        )

    def add_one(
        self,
        kind: _Kind,
        file: str,
        what: str,
        *,
        place: str,
        detail: str = "",
        line: int | None = None,
        key: str = "",
        value: str = "",
        values: Mapping[str, int] | None = None,
    ) -> None:
        """Lists a problem of a row, together with all others of its kind in its file.

        Args:
            kind: What is wrong.
            file: Where.
            what: The same in words for this row, in case it stays the only one.
            place: The row, as in "line 12".
            detail: What is wrong with this row, where rows of this kind differ in it.
            line: 1-based; None in npz.
            key: The column, or the array.
            value: What stands there.
            values: What to count over all rows of this kind, and how often this row has it.
        """
        group = self._groups.get((file, key, kind))
        if group is None:
            message = f"{what}; {kind.remedy}"
            first = Problem(file=file, line=line, key=key, value=_shorten(value), message=message)
            group = self._groups[file, key, kind] = _Group(first=first, kind=kind)
            self._listed.append(group)
        group.count += 1
        group.values.update(values or {})
        if len(group.shown) < SHOWN_PROBLEMS:
            group.shown.append(f"{place} ({detail})" if detail else place)

    def raise_if_any(self) -> None:
        """Raises DataError with all problems so far."""
        if self._listed:
            raise DataError(
                [each.problem() if isinstance(each, _Group) else each for each in self._listed]
            )


def _shorten(value: str) -> str:
    return value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}..."


def _read_source(settings: DataSettings, folder: Path) -> _Source:
    """The rows of the source, checked: of usable length, each sequence once, both labels."""
    problems = _Problems()
    source = _load(settings, folder, problems)
    loud = _nucleotide_warnings(source.rows)
    rows, warnings = _fit_length(source.rows, settings, problems)
    rows, repeated = _without_repeats(rows, settings, problems)
    if problems and loud:  # perhaps their reason: DNA is three times as long as its protein
        problems.add(source.rows[0].file, loud[0], key="sequence", value=source.rows[0].sequence)
    problems.raise_if_any()
    return replace(
        source,
        rows=tuple(rows),
        warnings=(*loud, *source.warnings, *warnings, *repeated),
        loud=tuple(loud),
    )


def _nucleotide_warnings(rows: Sequence[_Row]) -> list[str]:
    """One loud sentence where sequences look like DNA: its letters are residues, too."""
    found = [row for row in rows if _ONLY_NUCLEOTIDES.fullmatch(row.sequence)]
    if len(found) < len(rows):
        found = [row for row in found if len(row.sequence) >= NUCLEOTIDE_LENGTH]
    if not found:
        return []
    first = found[0]
    warning = (
        f"DNA, NOT PROTEINS? {len(found):,} of {len(rows):,} sequences have only the letters "
        f"{NUCLEOTIDES} (the first in {first.file}, {first.place}: {_shorten(first.sequence)}). "
        "They are read as amino acids; if they are DNA or RNA, no result means anything: "
        "translate them into proteins first"
    )
    return [warning]


def _fit_length(
    rows: Sequence[_Row], settings: DataSettings, problems: _Problems
) -> tuple[list[_Row], list[str]]:
    """Cuts what is longer than `max_length` where the study file says so."""
    limit = settings.max_length
    if settings.truncate:
        cut = [replace(row, sequence=row.sequence[:limit], whole=row.sequence) for row in rows]
        count = sum(len(row.sequence) > limit for row in rows)
        were = counted(count, "sequence was", "sequences were")
        return cut, [f"{were} cut to the first {limit} residues"] * (count > 0)
    everything: tuple[_Row | _Refused, ...] = (*rows, *problems.refused)
    too_long = [row for row in everything if len(row.sequence) > limit]
    # Rows that were refused for something else count, too: this is to be the length that fits all.
    longest = max((len(row.sequence) for row in too_long), default=0)
    kind = _Kind(
        several=f"sequences longer than max_length, which is {limit}",
        remedy=f"set max_length = {longest} in [data] (the longest has that many), or "
        "truncate = true",
    )
    for row in sorted(too_long, key=lambda row: row.line or 0):  # stable: npz and files in order
        problems.add_one(
            kind,
            row.file,
            f"{row.place} has {len(row.sequence):,} residues, max_length is {limit}",
            place=row.place,
            detail=f"{len(row.sequence):,} residues",
            line=row.line,
            key="sequence",
            value=row.sequence,
        )
    return list(rows), []


def _without_repeats(
    rows: Sequence[_Row], settings: DataSettings, problems: _Problems
) -> tuple[list[_Row], list[str]]:
    """Keeps the first of equal sequences; contradicting labels are problems."""
    first_rows: dict[str, _Row] = {}
    what = "sequence"
    if settings.truncate:
        # What the network sees decides: two proteins that differ only behind the cut are one.
        what = f"sequence (its first {settings.max_length} residues)"
    for row in rows:
        first = first_rows.setdefault(row.sequence, row)
        if first.label == row.label:
            continue
        where = first.place if first.file == row.file else f"{first.file}, {first.place}"
        problems.add_one(
            _BOTH_LABELS,
            row.file,
            f"{row.place} says {row.label}, but the same {what} has label {first.label} in {where}",
            place=row.place,
            detail=f"{row.label}, but {first.label} in {where}",
            line=row.line,
            key="label",
            value=str(row.label),
        )
    repeats = len(rows) - len(first_rows)
    if not repeats:
        return list(rows), []
    repeat = counted(repeats, "row repeats", "rows repeat")
    warning = f"{repeat} an earlier {what} with the same label: left out"
    return list(first_rows.values()), [warning]


# --- sources -------------------------------------------------------------------------------------


class _UnavailableError(Exception):
    """The data set "solubility" is nowhere to be found. The message is the reason."""


def locate(folder: Path | None = None) -> Path | None:
    """Where the data set "solubility" lies on this machine; None where it has to be downloaded.

    Looked for in `folder` (the study file's), in $TUNER_DATA_DIR, and in the user's cache, which
    keeps a copy of what was found: $TUNER_DATA_DIR is not set in the user's next terminal.

    Raises:
        DataError: A file is there but is not the published one. In the cache, which is
            ours, such a file counts as missing: the next download replaces it.
    """
    problems = _Problems()
    for path in _given_paths(folder):
        if not os.path.lexists(path):
            continue
        content = _read_bytes(path, str(path), problems)
        problems.raise_if_any()
        found = hashlib.sha256(content).hexdigest()
        if found != SOLUBILITY_SHA256:
            problems.add(
                str(path),
                f"sha256 is {found}, not {SOLUBILITY_SHA256}: this is not the published data "
                "set; remove the file, or name its path as source in [data] to use it as data of "
                "your own",
                key="data.source",
                value="solubility",
            )
            problems.raise_if_any()
        _keep_in_cache(content)
        return path
    cached = _cached_path()
    try:
        found = hashlib.sha256(cached.read_bytes()).hexdigest()
    except OSError:
        return None
    return cached if found == SOLUBILITY_SHA256 else None


def fetch() -> Path:
    """The data set "solubility", downloaded into the user's cache unless it is here already.

    Raises:
        DataError: It cannot be downloaded, or a file in $TUNER_DATA_DIR is not the published one.
    """
    try:
        return locate() or _download()
    except _UnavailableError as error:
        raise _unavailable(error, None) from None


def _given_paths(folder: Path | None) -> list[Path]:
    """Where the user may have put the data set."""
    folders = [] if folder is None else [folder]
    if os.environ.get("TUNER_DATA_DIR"):
        folders.append(Path(os.environ["TUNER_DATA_DIR"]))
    return [each / SOLUBILITY_FILE for each in folders]


def _cached_path() -> Path:
    import platformdirs  # noqa: PLC0415 - workers do not need it

    return platformdirs.user_cache_path("tuner", appauthor=False) / SOLUBILITY_FILE


def _keep_in_cache(content: bytes) -> None:
    cached = _cached_path()
    with contextlib.suppress(OSError):  # a cache that cannot be written is only missed
        if not cached.exists() or cached.stat().st_size != len(content):
            publish(cached, content)


def _download() -> Path:
    """Downloads the data set into the user's cache; whole and verified, or not at all."""
    import pooch  # noqa: PLC0415 - takes 0.2 s, and most runs download nothing

    target = _cached_path()
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints to stderr, which is ours
    try:
        pooch.retrieve(
            SOLUBILITY_URL,
            known_hash=f"sha256:{SOLUBILITY_SHA256}",
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS)),
        )
    except OSError as error:  # those of requests are OSErrors too
        status = getattr(getattr(error, "response", None), "status_code", None)
        # The text of connection errors may hold a proxy's password: their names have to do.
        kind = type(error).__name__
        reason = f"HTTP status {status}" if status else f"{kind} {error.strerror or ''}".strip()
        raise _UnavailableError(f"{SOLUBILITY_URL}: {reason}") from error
    except ValueError as error:
        raise _UnavailableError(f"{SOLUBILITY_URL} sent another file (wrong sha256)") from error
    finally:
        logger.setLevel(level)
    return target


def _unavailable(error: _UnavailableError, folder: Path | None) -> DataError:
    looked = ", ".join(str(path) for path in (*_given_paths(folder), _cached_path()))
    message = (
        f'the data set "solubility" is not here (looked for {looked}) and cannot be downloaded '
        f"({error}); put {SOLUBILITY_FILE} into a folder and name that folder in TUNER_DATA_DIR, "
        'or set fallback = "synthetic" in [data] to try things out on generated data'
    )
    return DataError(
        [Problem(file="", line=None, key="data.source", value="solubility", message=message)]
    )


def _load(settings: DataSettings, folder: Path, problems: _Problems) -> _Source:
    """The rows of whatever `settings.source` names, each one checked by itself."""
    source = settings.source
    if not isinstance(source, str):
        return _load_fasta(source, folder, problems)
    if source == "synthetic":
        return _synthetic_source()
    if source != "solubility":
        path = _resolve(source, folder)
        return _load_file(source, path, source, problems)
    try:
        path = locate(folder) or _download()
    except _UnavailableError as error:
        if settings.fallback != "synthetic":
            raise _unavailable(error, folder) from None
        generated = _synthetic_source()
        warning = (
            f'SYNTHETIC DATA: the data set "solubility" cannot be had ({error}), so this study '
            f"runs on {len(generated.rows):,} generated sequences; its figures say nothing about "
            "proteins"
        )
        return replace(generated, warnings=(warning,))
    return _load_file("solubility", path, str(path), problems)


def _load_file(name: str, path: Path, file: str, problems: _Problems) -> _Source:
    """One file with both labels: .npz, .csv or .tsv. `file` is its name in messages."""
    rows: list[_Row] = []
    warnings: list[str] = []
    content = _read_bytes(path, file, problems)
    if content:
        if path.name.lower().endswith(".npz"):
            rows = _npz_rows(file, content, problems)
        else:
            delimiter = "\t" if path.name.lower().endswith(".tsv") else ","
            rows, warnings = _csv_rows(file, content, delimiter, problems)
        _check_labels(file, rows, problems)
    return _Source(
        name=name,
        synthetic=False,
        sha256=hashlib.sha256(content).hexdigest(),
        rows=tuple(rows),
        warnings=tuple(warnings),
    )


def _load_fasta(pair: FastaPair, folder: Path, problems: _Problems) -> _Source:
    """Two FASTA files, one for each label."""
    digests = b""
    rows: list[_Row] = []
    ids: list[set[str]] = []
    lower_case = 0
    for file, label in ((pair.soluble, 1), (pair.insoluble, 0)):
        content = _read_bytes(_resolve(file, folder), file, problems)
        digests += hashlib.sha256(content).digest()
        if content:
            file_rows, file_ids, file_lower_case = _fasta_rows(file, content, label, problems)
            rows += file_rows
            ids.append(file_ids)
            lower_case += file_lower_case
    warnings = _lower_case_warnings(lower_case)
    shared = set.intersection(*ids) if ids else set()
    if len(ids) == 2 and shared:
        warnings.append(
            f"{len(shared):,} ids stand in both FASTA files (as {_shorten(min(shared))!r} does): "
            "taken as different proteins"
        )
    return _Source(
        name=f"{pair.soluble}, {pair.insoluble}",
        synthetic=False,
        sha256=hashlib.sha256(digests).hexdigest(),
        rows=tuple(rows),
        warnings=tuple(warnings),
    )


def _check_labels(file: str, rows: Sequence[_Row], problems: _Problems) -> None:
    """Both labels must be there. Not asked where rows were refused: they may be the others."""
    labels = {row.label for row in rows}
    if problems or len(labels) == 2:
        return
    if not labels:
        problems.add(file, "holds no rows; a study needs soluble and insoluble sequences")
        return
    (label,) = labels
    problems.add(
        file,
        f"every row has label {label}; a classifier needs both, 1 (soluble) and 0 (insoluble)",
        key="label",
        value=str(label),
    )


# --- files ---------------------------------------------------------------------------------------


def source_files(settings: DataSettings, folder: Path) -> tuple[Path, ...]:
    """The files that a study file in `folder` names as its source.

    One, or two of a pair (soluble, insoluble); none of "solubility" and "synthetic".
    """
    if settings.source in ("solubility", "synthetic"):
        return ()
    return tuple(_resolve(name, folder) for name in _names(settings))


def source_sha256(files: Sequence[Path]) -> str:
    """What `DataIdentity.sha256` is of these files: of the bytes, or of a pair's two digests.

    Raises:
        OSError: One cannot be read, or is not a regular file.
    """
    return _joint_sha256([_file_sha256(file) for file in files])


def find_source(
    settings: DataSettings, folders: Iterable[Path], sha256: str
) -> tuple[Path, ...] | None:
    """Files of this content, in the order of `source_files`; None where there are none.

    In each folder looked for as the study file names them, then by their last names, then under
    any name that ends alike.

    Args:
        settings: The study file's `[data]`.
        folders: Where to look, the likeliest first.
        sha256: Their `source_sha256`.
    """
    names = _names(settings)
    digest = functools.cache(_file_sha256)
    for folder in dict.fromkeys(folders):
        named = tuple(_resolve(name, folder) for name in names)
        likely = (named, tuple(folder / file.name for file in named))
        for files in itertools.chain(likely, _alike(folder, names)):
            with contextlib.suppress(OSError):
                if _joint_sha256([digest(file) for file in files]) == sha256:
                    return files
    return None


def with_files(settings: DataSettings, files: Sequence[Path]) -> DataSettings:
    """The same settings with these files as the source."""
    paths = [str(file) for file in files]
    if isinstance(settings.source, str):
        return settings.model_copy(update={"source": paths[0]})
    pair = settings.source.model_copy(update=dict(zip(PAIR, paths, strict=True)))
    return settings.model_copy(update={"source": pair})


#: The keys of a pair of FASTA files, in the order of `source_files`.
PAIR = ("soluble", "insoluble")


def _names(settings: DataSettings) -> tuple[str, ...]:
    """The source's files as the study file names them."""
    source = settings.source
    if isinstance(source, str):
        return (SOLUBILITY_FILE if source == "solubility" else source,)
    return (source.soluble, source.insoluble)


def _alike(folder: Path, names: Sequence[str]) -> Iterator[tuple[Path, ...]]:
    """Files of the folder that may stand for those of these names; for two, every pair."""
    suffixes = {PurePath(name).suffix.lower() for name in names}
    try:
        inside = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    except OSError:
        return
    yield from itertools.permutations(inside, len(names))


def _joint_sha256(digests: Sequence[bytes]) -> str:
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()


def _file_sha256(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe might never end
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _beside_the_study_file(
    settings: DataSettings, folder: Path, sha256: str | None
) -> DataSettings | None:
    """The settings with files of the known content, where those that are named are missing."""
    named = source_files(settings, folder)
    if sha256 is None or all(os.access(file, os.F_OK) for file in named):
        return None
    found = find_source(settings, [folder], sha256)
    return None if found is None else with_files(settings, found)


def _warn_of_another_source(
    there: DataSettings | None, source: _Source, sha256: str | None
) -> Iterator[str]:
    if there is not None:
        found = ", ".join(_names(there))
        yield f"the data is not where the study file names it; {found} has the same sha256"
    elif sha256 is not None and not source.synthetic and source.sha256 != sha256:
        yield (
            f"{source.name} has sha256 {source.sha256[:12]}, but [provenance] of the study file "
            f"tells of {sha256[:12]}: these are other data than the configuration was found on"
        )


def _resolve(name: str, folder: Path) -> Path:
    """A path of the study file's; relative ones start at its folder."""
    return folder / (Path(name).expanduser() if name.startswith("~/") else Path(name))


def _read_bytes(path: Path, file: str, problems: _Problems, *, outages: bool = False) -> bytes:
    """The file's bytes; none, with a problem added, where there are none to be had.

    With `outages`, what keeps the system from reading it is raised as it is.
    """
    content = b""
    try:
        if path.is_dir():
            problems.add(file, "is a folder; name a file in it", value=file)
        elif not path.exists():
            problems.add(
                file,
                f"does not exist (looked for {path}); relative paths start at the study file's "
                "folder",
                value=file,
            )
        elif not path.is_file():  # reading a pipe or a device might never end
            problems.add(file, "is not a regular file; copy the data into one", value=file)
        else:
            content = path.read_bytes()
            if not content:
                problems.add(file, "is empty; was it copied or written to the end?", value=file)
    except OSError as error:
        if outages:
            raise
        problems.add(file, f"cannot be read: {error.strerror or error}", value=file)
    return content


def _text(file: str, content: bytes, problems: _Problems) -> str | None:
    """The file's text, without byte order marks; None, with a problem added, if it is none."""
    if content.startswith(b"\x1f\x8b"):
        problems.add(file, "is compressed with gzip; unpack it first (gunzip)")
        return None
    wide = _wide_encoding(content)
    if wide is not None:
        problems.add(file, f"is not UTF-8 text but {wide}; save it as UTF-8", line=1, value=wide)
        return None
    try:
        # Programs that take a mark for text put a second one before it.
        return content.decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        problems.add(
            file,
            f"is not UTF-8 text (byte {error.object[error.start]:#04x}); save it as UTF-8",
            line=content.count(b"\n", 0, error.start) + 1,
            value=f"{error.object[error.start]:#04x}",
        )
        return None


#: The byte order mark, if any, and which of four bytes are zero in Latin letters.
_WIDE_ENCODINGS = (
    ("UTF-32", b"\xff\xfe\0\0", (1, 2, 3)),
    ("UTF-32", b"\0\0\xfe\xff", (0, 1, 2)),
    ("UTF-16", b"\xff\xfe", (1, 3)),
    ("UTF-16", b"\xfe\xff", (0, 2)),
)
_ENCODING_SAMPLE = 4_096  # bytes


def _wide_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, by byte order mark or, without one, by where zero bytes stand."""
    sample = content[:_ENCODING_SAMPLE]
    for name, mark, zeros in _WIDE_ENCODINGS:
        places = [sample[place::4] for place in zeros]
        if sample.startswith(mark) or all(each.count(0) * 2 > len(each) for each in places):
            return name
    return None


def _checked_sequence(
    raw: str, file: str, line: int, subject: str, problems: _Problems
) -> str | None:
    """The sequence in upper case; None, with a problem added, where it is not one."""
    sequence = raw.strip()
    place = f"line {line}"
    if not sequence:
        what = f"{subject} is empty"
        problems.add_one(_EMPTY, file, what, place=place, line=line, key="sequence")
        return None
    positions: dict[str, list[int]] = {}
    for wrong in _NOT_A_RESIDUE.finditer(sequence):
        positions.setdefault(wrong[0], []).append(wrong.start() + 1)
    if not positions:
        return sequence.upper()
    first, *others = positions.items()
    rest = "".join(f", {_bad_letter(*other)}" for other in others)
    problems.add_one(
        _RNA if _ONLY_NUCLEOTIDES.fullmatch(sequence) else _WRONG_RESIDUE,
        file,
        _bad_letter(*first, subject) + rest,
        place=place,
        detail=_bad_letter(*first) + rest,
        line=line,
        key="sequence",
        value=sequence[first[1][0] - 1 :],
        values={repr(letter): len(each) for letter, each in positions.items()},
    )
    problems.refused.append(_Refused(file=file, line=line, place=place, sequence=sequence))
    return None


def _bad_letter(letter: str, positions: Sequence[int], subject: str = "") -> str:
    """Where a wrong letter stands: "residue 3 is 'X'", "residues 3, 5 and 900 more are 'X'"."""
    of = f" of {subject}" if subject else ""
    if len(positions) == 1:
        return f"residue {positions[0]:,}{of} is {letter!r}"
    listed = ", ".join(f"{position:,}" for position in positions[:SHOWN_POSITIONS])
    more = len(positions) - SHOWN_POSITIONS
    return f"residues {listed}{f' and {more:,} more' if more > 0 else ''}{of} are {letter!r}"


def _lower_case_warnings(count: int) -> list[str]:
    have = counted(count, "sequence has", "sequences have")
    return [f"{have} lower-case residues: read as upper case"] if count else []


def _csv_rows(
    file: str, content: bytes, delimiter: str, problems: _Problems
) -> tuple[list[_Row], list[str]]:
    """Rows of a CSV or TSV file with the columns `sequence` and `label`; others are ignored."""
    rows: list[_Row] = []
    text = _text(file, content, problems)
    if text is None:
        return rows, []
    lower_case = 0
    columns: list[str] = []
    for record in _records(file, text, delimiter, problems):
        if not columns:
            columns = [field.strip().lower() for field in record.fields]
            if _may_hold_rows(record, columns, file, delimiter, problems) or not _has_columns(
                file, record.line, columns, delimiter, problems
            ):
                break
        elif not _may_hold_rows(record, columns, file, delimiter, problems):
            row = _csv_row(record, columns, file, delimiter, problems)
            if row is not None:
                lower_case += row.sequence != record.fields[columns.index("sequence")].strip()
                rows.append(row)
    if not columns and not problems:
        problems.add(file, "holds no rows; the first line has to be: sequence,label")
    return rows, _lower_case_warnings(lower_case)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A record of a CSV or TSV file: a line, or several where a quoted field has line breaks."""

    fields: list[str]
    line: int  #: the first, from 1
    last_line: int

    @property
    def place(self) -> str:
        if self.last_line == self.line:
            return f"line {self.line}"
        return f"lines {self.line} to {self.last_line}"


def _records(file: str, text: str, delimiter: str, problems: _Problems) -> Iterator[_Record]:
    """The records of a CSV or TSV file that are not blank; ends at what cannot be read."""
    csv.field_size_limit(_LONGEST_FIELD)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    last_line = 0
    try:
        for fields in reader:
            line, last_line = last_line + 1, reader.line_num
            # Spreadsheets save many rows of empty cells.
            if any(map(str.strip, fields)):
                yield _Record(fields=fields, line=line, last_line=last_line)
    except csv.Error as error:
        last = f"line {reader.line_num}" + ("" if stream.read(1) else ", the end of the file")
        message = (
            f"the record cannot be read as {delimiter!r}-separated text from here to {last} "
            f"({error}); check the quotes: close or remove the one that stands alone"
        )
        problems.add(file, message, line=last_line + 1)


def _csv_row(
    record: _Record, columns: Sequence[str], file: str, delimiter: str, problems: _Problems
) -> _Row | None:
    """The row of a record; None, with problems added, where it is not one."""
    fields, line, place = record.fields, record.line, record.place
    if len(fields) != len(columns):
        what = f"{counted(len(fields), 'field')} where the header names {len(columns)}"
        problems.add_one(
            _WRONG_FIELDS,
            file,
            what if line == record.last_line else f"{what}, in {place}",
            place=place,
            detail=str(len(fields)),
            line=line,
            value=delimiter.join(fields),
        )
        return None
    raw = fields[columns.index("sequence")]
    label = fields[columns.index("label")].strip()
    sequence = _checked_sequence(raw, file, line, "the sequence", problems)
    if label in ("0", "1"):
        if sequence is None:
            return None
        return _Row(sequence=sequence, label=int(label), file=file, line=line, place=f"line {line}")
    shown = repr(_shorten(label))
    problems.add_one(
        _WRONG_LABEL,
        file,
        f"{shown} is no label",
        place=place,
        detail=shown,
        line=line,
        key="label",
        value=label,
        values={shown: 1},
    )
    if sequence is not None:
        problems.refused.append(_Refused(file=file, line=line, place=place, sequence=sequence))
    return None


def _may_hold_rows(
    record: _Record, columns: Sequence[str], file: str, delimiter: str, problems: _Problems
) -> bool:
    """Whether a record of several lines may have swallowed rows; adds the problem.

    A lone quote makes a field of all that follows up to the next lone quote: the rest of its row,
    whole rows, and the start of the row with that quote. If both stand in one column, what is left
    is a row with the right number of fields: the first row's sequence with the last row's label.

    In TSV a record is a line. In CSV a field may hold line breaks, so its text decides: it may not
    in the columns `sequence` and `label`, nor where it looks like rows.
    """
    if record.last_line == record.line:
        return False
    for at, text in enumerate(record.fields):
        if delimiter == "\t" and _LINE_END.search(text):
            kind, why = _SEVERAL_LINES_TSV, "a TSV record is one line"
        elif _LINE_END.search(text.strip()) and (
            columns[at : at + 1] in (["sequence"], ["label"])
            or _looks_like_rows(text, at, columns, delimiter)
        ):
            kind, why = _SEVERAL_LINES, "may hold rows of the file"
        else:
            continue
        problems.add_one(
            kind,
            file,
            f"a quoted field runs over {record.place}, and {why}",
            place=record.place,
            line=record.line,
            key="".join(columns[at : at + 1]),
            value=text,
        )
        return True
    return False


def _looks_like_rows(text: str, at: int, columns: Sequence[str], delimiter: str) -> bool:
    """Whether the text of a field, the one in column `at`, may be the swallowed part of rows.

    Cut at delimiters, it has a sequence and a label among its pieces. Or, as the sequences and
    labels of a file may be wrong: each of its lines has as many delimiters as swallowed rows, and
    where these have their sequence, a word or nothing, or where they have their label, 0 or 1.
    """
    first, *middle, last = (
        [piece.strip(' "') for piece in line.split(delimiter)] for line in _LINE_END.split(text)
    )
    middle = [line for line in middle if any(line)]
    pieces = [*first, *(piece for line in middle for piece in line), *last]
    if {"0", "1"} & set(pieces) and any(
        piece and not _NOT_A_RESIDUE.search(piece) for piece in pieces
    ):
        return True
    width = len(columns)
    whole = all(len(line) == width for line in middle)
    if not (whole and len(first) == width - at and len(last) == at + 1):
        return False

    def swallowed(column: str) -> list[str]:
        """Its cells in the rest of the first row, the rows between, and the start of the last."""
        place = columns.index(column)
        cells = [line[place] for line in middle]
        if place > at:
            cells.append(first[place - at])
        if place < at:
            cells.append(last[place])
        return cells

    if not {"sequence", "label"} <= set(columns):  # of the header, whose end was swallowed, too
        return True
    words = [cell for cell in swallowed("sequence") if len(cell.split()) < 2]
    return bool(words) or bool({"0", "1"} & set(swallowed("label")))


def _has_columns(
    file: str, line: int, columns: Sequence[str], delimiter: str, problems: _Problems
) -> bool:
    """Whether the header names `sequence` and `label`, each once."""
    header = delimiter.join(columns)
    usable = True
    for name in ("sequence", "label"):
        if columns.count(name) == 1:
            continue
        usable = False
        if name in columns:
            message = f"{columns.count(name)} columns are called {name!r}; rename all but one"
        else:
            message = (
                f"no column {name!r}; the first line must name the columns, separated by "
                f"{'tabs (.tsv)' if delimiter == chr(9) else 'commas (.csv)'}, as in "
                f"sequence{delimiter}label"
            )
        problems.add(file, message, line=line, key=name, value=header)
    return usable


def _fasta_rows(
    file: str, content: bytes, label: int, problems: _Problems
) -> tuple[list[_Row], set[str], int]:
    """Rows of a FASTA file, their ids, and how many held lower case.

    dnaio lets empty and impossible records through and knows no lines: both are seen to here.
    """
    import dnaio  # noqa: PLC0415 - takes 0.1 s, and most sources are no FASTA

    rows: list[_Row] = []
    line_of_id: dict[str, int] = {}
    lower_case = 0
    text = _text(file, content, problems)
    if text is None:
        return rows, set(), lower_case
    # dnaio decodes as the locale says and refuses what is not ASCII; here that is a bad residue.
    text = text.encode("ascii", "backslashreplace").decode()
    lines = [line.strip() for line in io.StringIO(text, newline=None)]
    headers = (number for number, line in enumerate(lines, start=1) if line.startswith(">"))
    reader = dnaio.FastaReader(io.BytesIO(text.encode()))
    found = 0
    try:
        for line, record in zip(headers, reader, strict=True):
            found += 1
            name = (record.name.split() or [""])[0]
            if not name:
                what = "a header without an id"
                problems.add_one(_NO_ID, file, what, place=f"line {line}", line=line, key="id")
            elif line_of_id.setdefault(name, line) != line:
                shown, first = repr(_shorten(name)), line_of_id[name]
                problems.add_one(
                    _REPEATED_ID,
                    file,
                    f"id {shown} stands in line {first} already",
                    place=f"line {line}",
                    detail=f"{shown}, as in line {first}",
                    line=line,
                    key="id",
                    value=name,
                )
            subject = f"the sequence {_shorten(name)!r}"
            sequence = _checked_sequence(record.sequence, file, line, subject, problems)
            if sequence is not None:
                lower_case += sequence != record.sequence
                rows.append(
                    _Row(sequence=sequence, label=label, file=file, line=line, place=f"line {line}")
                )
    except dnaio.FastaFormatError as error:
        line = (error.line or 0) + 1
        message = "a FASTA record starts with a line >NAME; remove what stands before the first"
        problems.add(file, message, line=line, value=lines[line - 1])
    else:
        if not found:
            problems.add(file, "holds no records; each is a line >NAME with its residues below")
    return rows, set(line_of_id), lower_case


class _DamagedError(Exception):
    """An npz file, or an array in it, that cannot be read. The message is the reason."""


def _archive(content: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(content))
    except Exception as error:  # whatever foreign bytes make zipfile raise
        raise _DamagedError(_shorten(str(error) or type(error).__name__)) from error


def _member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """An array of an npz file; KeyError if there is none of this name.

    Object arrays are refused: to unpickle is to run foreign code.
    """
    member = archive.getinfo(f"{name}.npy")
    try:
        with archive.open(member) as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # zipfile, zlib, NumPy and tokenize (!), each in its own words
        raise _DamagedError(_shorten(str(error) or type(error).__name__)) from error
    return array


def _npz_rows(file: str, content: bytes, problems: _Problems) -> list[_Row]:
    """Rows of an npz file with the token arrays `positives` and `negatives`."""
    rows: list[_Row] = []
    try:
        archive = _archive(content)
    except _DamagedError as error:
        message = f"is not an npz file, or was cut ({error}); write it with numpy.savez"
        problems.add(file, message)
        return rows
    with archive:
        for name, label in _ARRAYS:
            tokens = _npz_tokens(archive, file, name, problems)
            if tokens is not None:
                rows += _token_rows(tokens, file, name, label, problems)
    return rows


def _npz_tokens(
    archive: zipfile.ZipFile, file: str, name: str, problems: _Problems
) -> npt.NDArray[np.integer[Any]] | None:
    """An array of integers [rows, width]; None, with a problem added, where it is none."""
    wanted = "tokens are integers [rows, width]: 0 pads at the end, 1-20 are the residues"
    try:
        array = _member(archive, name)
    except KeyError:
        names = ", ".join(member.removesuffix(".npy") for member in archive.namelist())
        message = (
            f"no array {name!r}, only: {_shorten(names) or 'none'}; it needs positives and "
            "negatives"
        )
        problems.add(file, message, key=name, value=names)
        return None
    except _DamagedError as error:
        problems.add(file, f"cannot be read ({error}); {wanted}", key=name)
        return None
    if array.dtype.kind not in "iu":
        message = f"has dtype {array.dtype}; {wanted}"
        problems.add(file, message, key=name, value=str(array.dtype))
        return None
    if array.ndim != 2:
        message = f"has shape {array.shape}; {wanted}"
        problems.add(file, message, key=name, value=str(array.shape))
        return None
    return array


def _token_rows(
    tokens: npt.NDArray[np.integer[Any]], file: str, name: str, label: int, problems: _Problems
) -> list[_Row]:
    """The rows of one array [rows, width], as sequences."""
    letter_of_token = np.frombuffer(f"-{RESIDUES}".encode(), dtype=np.uint8)
    impossible = (tokens < 0) | (tokens > len(RESIDUES))
    real = tokens != 0
    gap = real[:, 1:] & ~real[:, :-1]
    bad = impossible.any(axis=1) | gap.any(axis=1) | ~real.any(axis=1)
    for row in np.flatnonzero(bad).tolist():
        values: dict[str, int] = {}
        if impossible[row].any():
            kind = _WRONG_TOKEN
            wrong = np.flatnonzero(impossible[row])
            detail = "token " + ", ".join(
                f"{tokens[row, position]} at position {position}"
                for position in wrong[:SHOWN_VALUES]
            )
            if len(wrong) > SHOWN_VALUES:
                detail += f" and {len(wrong) - SHOWN_VALUES:,} more"
            values = Counter(f"token {token}" for token in tokens[row, wrong].tolist())
            what = f"has {detail}"
        elif gap[row].any():
            kind, detail = _PADDING_INSIDE, f"at position {int((~real[row]).argmax())}"
            what = f"has padding (0) inside the sequence, {detail}"
        else:
            kind, detail, what = _NO_TOKENS, "", "is an empty sequence"
        problems.add_one(
            kind,
            file,
            f"row {row} (counted from 0) {what}",
            place=f"row {row}",
            detail=detail,
            key=name,
            value=" ".join(str(token) for token in tokens[row, :SHOWN_CHARACTERS]),
            values=values,
        )
        residues = letter_of_token[np.where(impossible[row], 0, tokens[row])]
        end = int(np.flatnonzero(real[row]).max(initial=-1)) + 1
        problems.refused.append(
            _Refused(
                file=file,
                line=None,
                place=f"row {row} of {name}",
                sequence=residues[:end].tobytes().decode(),
            )
        )
    good = np.flatnonzero(~bad)
    letters = letter_of_token[tokens[good]]
    lengths = real[good].sum(axis=1)
    return [
        _Row(
            sequence=residues[:length].tobytes().decode(),
            label=label,
            file=file,
            line=None,
            place=f"row {row} of {name}",
        )
        for row, residues, length in zip(good.tolist(), letters, lengths.tolist(), strict=True)
    ]


# --- split ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """The rows of each split, in the order of their hashes."""

    training: tuple[_Row, ...]
    validation: tuple[_Row, ...]
    test: tuple[_Row, ...]


def _split(source: _Source, settings: SplitSettings) -> _Split:
    """Splits the rows by their sequences alone.

    Within each label, rows are ordered by sha256("<split seed>:<sequence>"). The first `test`
    part of them is the test split, the next `validation` part the validation split, the rest
    the training split. Parts are rounded to whole rows, halves to the even number.

    Raises:
        DataError: Too few rows of a label.
    """
    problems = _Problems()
    parts: dict[str, list[_Row]] = {"test": [], "validation": [], "training": []}

    def order(row: _Row) -> bytes:
        return hashlib.sha256(f"{settings.seed}:{row.sequence}".encode()).digest()

    for label in (1, 0):
        ordered = sorted((row for row in source.rows if row.label == label), key=order)
        test = round(settings.test * len(ordered))
        validation = round(settings.validation * len(ordered))
        ends = {"test": test, "validation": test + validation, "training": len(ordered)}
        start = 0
        counts = []
        for name, end in ends.items():
            parts[name] += ordered[start:end]
            counts.append(end - start)
            start = end
        if len(ordered) < MINIMUM_ROWS or min(counts) < 1:
            problems.add(
                source.name,
                f"too few rows of label {label}: {len(ordered)} different ones ({counts[0]} test, "
                f"{counts[1]} validation, {counts[2]} training); at least {MINIMUM_ROWS} of each "
                "label and one in each split are needed: add rows, or raise validation or test "
                "of split in [data]",
                key="label",
                value=str(label),
            )
    problems.raise_if_any()
    # By hash over both labels: a reader that takes the rows in order meets the labels mixed.
    return _Split(**{name: tuple(sorted(rows, key=order)) for name, rows in parts.items()})


def _hashes(split: _Split) -> SplitHashes:
    return SplitHashes(
        **{
            name: frozenset(hash_sequence(row.whole or row.sequence) for row in rows)
            for name, rows in (
                ("training", split.training),
                ("validation", split.validation),
                ("test", split.test),
            )
        }
    )


def _identity(source: _Source, split: _Split, settings: DataSettings) -> DataIdentity:
    # Without the seed, so that it names the set of test sequences, however they were chosen.
    hashes = sorted(hashlib.sha256(row.sequence.encode()).hexdigest() for row in split.test)
    return DataIdentity(
        source=source.name,
        synthetic=source.synthetic,
        sha256=source.sha256,
        split_id=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        split_seed=settings.split.seed,
        max_length=settings.max_length,
        training_rows=len(split.training),
        validation_rows=len(split.validation),
        test_rows=len(split.test),
    )


def _arrays(rows: Sequence[_Row], max_length: int) -> tuple[Tokens, Tokens]:
    """Tokens [n, max_length] and labels [n], both uint8."""
    labels = np.array([row.label for row in rows], dtype=np.uint8)
    return encode([row.sequence for row in rows], max_length), labels


# --- development file ----------------------------------------------------------------------------


def _npz(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """An npz file whose bytes depend on the arrays alone: no clock, no platform, no zlib."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # zipfile writes that of the running system
            info.external_attr = 0o600 << 16
            archive.writestr(info, member.getvalue())
    return content.getvalue()


def _write_development(path: Path, content: bytes) -> None:
    """Publishes the file; one of that name and content stays as it is."""
    try:
        if not path.is_file() or path.read_bytes() != content:
            publish(path, content)
    except OSError as error:
        raise TunerError(
            f"{path}: the development file cannot be written ({error.strerror or error}); free "
            "the disk or name another folder in TUNER_ARTIFACTS"
        ) from error


# --- synthetic data ------------------------------------------------------------------------------

SYNTHETIC_ROWS = 6_000
SYNTHETIC_SEED = 20_260_101
#: A run of this many residues out of these makes a generated protein insoluble.
SYNTHETIC_PATCH_LENGTH = 4
SYNTHETIC_PATCH_RESIDUES = "FILVWY"
#: Labels flipped at random, percent: what no model can predict.
SYNTHETIC_NOISE_PERCENT = 15
SYNTHETIC_BEST_ACCURACY = 1 - SYNTHETIC_NOISE_PERCENT / 100
#: Binary cross-entropy of the one who knows the rule and the noise, nats.
SYNTHETIC_BEST_LOSS = 0.4227

#: Lengths at every 5 % of the published data set's sequences, residues.
_LENGTH_QUANTILES = (
    *(19, 72, 87, 97, 104, 112, 118, 124, 131, 137, 143),
    *(148, 154, 159, 165, 170, 176, 181, 187, 193, 198),
)
#: Residues per 10,000 in UniProtKB/Swiss-Prot (release statistics), in the order of `RESIDUES`.
_COMPOSITION = (
    *(825, 553, 406, 546, 138, 393, 672, 707, 227, 591),
    *(965, 580, 241, 386, 474, 665, 536, 110, 292, 686),
)
_TILTS = (-20, 0, 20)  # percent more charged and fewer patch residues, a third of the rows each


def synthetic_sequences() -> tuple[list[str], list[int]]:
    """Sequences and labels (1 soluble) that look like proteins but follow a known rule.

    A sequence is insoluble if it has a run of `SYNTHETIC_PATCH_LENGTH` residues out of
    `SYNTHETIC_PATCH_RESIDUES`; then `SYNTHETIC_NOISE_PERCENT` % of the labels are flipped. Some
    sequences are rich in charged, some in patch residues, so composition tells a part of it.

    Only integers and the raw output of PCG64, which NumPy promises never to change (NEP 19), so
    that the rows are the same everywhere.
    """
    raw = np.random.PCG64(SYNTHETIC_SEED).random_raw

    def draw(below: int, count: int = SYNTHETIC_ROWS) -> npt.NDArray[np.int64]:
        return np.asarray(raw(count) % np.uint64(below), dtype=np.int64)

    quantiles = np.array(_LENGTH_QUANTILES)
    step = draw(len(quantiles) - 1)
    low, high = quantiles[step], quantiles[step + 1]
    lengths = low + draw(1_000) * (high - low + 1) // 1_000
    longest = max(_LENGTH_QUANTILES)
    inside = np.arange(longest) < lengths[:, np.newaxis]

    in_patch = np.array([residue in SYNTHETIC_PATCH_RESIDUES for residue in RESIDUES])
    charged = np.array([residue in "DEKR" for residue in RESIDUES])
    tilts = np.array(_TILTS)[draw(len(_TILTS))]
    draws = draw(2**40, SYNTHETIC_ROWS * longest).reshape(SYNTHETIC_ROWS, longest)
    residues = np.zeros_like(draws)
    for tilt in _TILTS:
        weights = np.array(_COMPOSITION) * (100 + tilt * charged - tilt * in_patch)
        limits = np.cumsum(weights)
        rows = tilts == tilt
        residues[rows] = np.searchsorted(limits, draws[rows] % limits[-1], side="right")
    residues[draw(3) < 2, 0] = RESIDUES.index("M")  # two of three start with it, as real ones do

    sticky = in_patch[residues] & inside
    windows = np.lib.stride_tricks.sliding_window_view(sticky, SYNTHETIC_PATCH_LENGTH, axis=1)
    soluble = ~np.any(np.all(windows, axis=2), axis=1)
    flipped = draw(100) < SYNTHETIC_NOISE_PERCENT
    letters = np.frombuffer(RESIDUES.encode(), dtype=np.uint8)[residues]
    sequences = [
        letters[row, :length].tobytes().decode() for row, length in enumerate(lengths.tolist())
    ]
    return sequences, (soluble ^ flipped).astype(int).tolist()


def _synthetic_source() -> _Source:
    sequences, labels = synthetic_sequences()
    content = "".join(f"{label},{each}\n" for each, label in zip(sequences, labels, strict=True))
    rows = tuple(
        _Row(sequence=each, label=label, file="synthetic", line=None, place=f"row {number}")
        for number, (each, label) in enumerate(zip(sequences, labels, strict=True))
    )
    return _Source(
        name="synthetic",
        synthetic=True,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        rows=rows,
        warnings=(),
    )
