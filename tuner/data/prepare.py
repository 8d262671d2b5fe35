"""Where the data comes from, what it must look like, and how it is split and sealed.

A study's source is read once, by `prepare`: every row is checked, the rows are split, and a
*development file* with the training and validation rows alone is written under the artifacts
folder. Whatever trains gets that file and never the source. `read_held_out` returns the test
rows; `tuner.results.heldout` alone calls it, after it has written the ledger.

All formats become the same rows (a sequence and a label), and split and development file depend
on those rows alone: not on the file, its format or the order of its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.artifacts import development_path
from tuner.data.arrays import npz_bytes
from tuner.data.development import (
    DevelopmentData,
    development_of,
    split_arrays,
    write_development,
)
from tuner.data.files import load_source
from tuner.data.homology import Clusters, cluster
from tuner.data.identity import DataIdentity, identity_of
from tuner.data.problems import (
    BOTH_LABELS,
    TWO_PARTS,
    Kind,
    Problems,
    Refused,
    shortened,
)
from tuner.data.rows import Row, Source, Tokens, kept_in_words, truncated
from tuner.data.sources import beside_the_study_file, file_names, warn_of_another_source
from tuner.data.split import Split, SplitHashes, hashes_of, split_rows
from tuner.data.text import NUCLEOTIDE_LENGTH, NUCLEOTIDES, ONLY_NUCLEOTIDES
from tuner.errors import counted
from tuner.metrics import small_split_warnings

if TYPE_CHECKING:
    from tuner.spec.spec import DataSettings, SplitSettings

#: By part, which of rows that are equal as they are cut is kept: the highest.
_RANKS: dict[str | None, int] = {None: 0, "training": 1, "validation": 2, "test": 3}
_FAR = 0.1  #: of what was asked for, by which a part may miss it without a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A source that was read, checked, split and sealed."""

    identity: DataIdentity  #: which data, and how it was split
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
class HeldOutRows:
    """The sealed test split."""

    tokens: Tokens  #: [test rows, max_length]
    labels: Tokens  #: [test rows]; 1 is soluble, 0 insoluble
    hashes: frozenset[bytes] = frozenset()  #: of their sequences, see `SplitHashes`


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRows:
    """What the audit of a source may see: of the test split the sequences, and no label."""

    development: DevelopmentData  #: training and validation rows
    test_tokens: Tokens  #: [test rows, max_length]
    left_out: int  #: rows whose sequence is there already, or has both labels


def prepare(
    settings: DataSettings,
    *,
    folder: Path,
    artifacts: Path,
    sha256: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Prepared:
    """Reads the source once, checks and splits it, and writes the development file.

    Args:
        settings: The study file's `[data]`.
        folder: Where the study file lies; relative paths start here.
        artifacts: The development file goes to `development/` under it.
        sha256: Of the source, where the study file tells it (an exported one does): a source that
            is missing is then looked for in `folder` under any name, and one of another content
            is warned of.
        say: Hears of what takes long.

    Raises:
        DataError: The source cannot be used; lists every problem found.
        TunerError: The development file cannot be written.
    """
    there = beside_the_study_file(settings, folder, sha256)
    source = _read_source(there or settings, folder)
    if there is not None:
        source = replace(source, name=", ".join(file_names(settings)))
    clusters = _clusters(source, settings.split, artifacts, say)
    split = split_rows(source, settings.split, clusters)
    content = npz_bytes(development_of(split, settings.max_length).arrays())
    development_sha256 = hashlib.sha256(content).hexdigest()
    development_file = development_path(artifacts, development_sha256)
    write_development(development_file, content)
    return Prepared(
        identity=identity_of(source, split, settings, clusters),
        development_file=development_file,
        development_sha256=development_sha256,
        warnings=(
            *source.warnings,
            *warn_of_another_source(there, source, sha256),
            *([] if clusters is None else _warn_of_fractions(split, settings.split)),
        ),
        loud=source.loud,
        hashes=hashes_of(split),
    )


def read_hashes(
    settings: DataSettings, *, folder: Path, artifacts: Path | None = None
) -> tuple[DataIdentity, SplitHashes]:
    """Which sequences a source has in which split; no rows are written.

    Raises:
        DataError: The source cannot be used; lists every problem found.
    """
    source = _read_source(settings, folder)
    clusters = _clusters(source, settings.split, artifacts)
    split = split_rows(source, settings.split, clusters)
    return identity_of(source, split, settings, clusters), hashes_of(split)


def read_for_audit(
    settings: DataSettings,
    *,
    folder: Path,
    artifacts: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[DataIdentity, AuditRows]:
    """The rows of a source as the audit may see them; none are written.

    With folds, its validation rows are those of the first fold, and its training rows all others.

    Raises:
        DataError: The source cannot be used; lists every problem found.
    """
    source = _read_source(settings, folder)
    clusters = _clusters(source, settings.split, artifacts, say)
    split = split_rows(source, settings.split, clusters)
    development = development_of(split, settings.max_length)
    if split.folds is not None:
        development = development.of_fold(0)
    test_tokens, _ = split_arrays(split.test, settings.max_length)
    rows = AuditRows(development=development, test_tokens=test_tokens, left_out=source.left_out)
    return identity_of(source, split, settings, clusters), rows


def read_held_out(
    settings: DataSettings, *, folder: Path, artifacts: Path | None = None
) -> tuple[DataIdentity, HeldOutRows]:
    """The test rows, read from the source again. Only `tuner.results.heldout` may call this.

    The caller compares the identity with the study's: the source may have changed since.

    Raises:
        DataError: The source cannot be used; lists every problem found.
    """
    source = _read_source(settings, folder)
    clusters = _clusters(source, settings.split, artifacts)
    split = split_rows(source, settings.split, clusters)
    tokens, labels = split_arrays(split.test, settings.max_length)
    rows = HeldOutRows(tokens=tokens, labels=labels, hashes=hashes_of(split).test)
    return identity_of(source, split, settings, clusters), rows


def _clusters(
    source: Source,
    settings: SplitSettings,
    artifacts: Path | None,
    say: Callable[[str], None] | None = None,
) -> Clusters | None:
    """The clusters of the source's sequences, test rows among them; None of another rule."""
    if settings.identity is None or settings.coverage is None:
        return None
    return cluster(
        [row.sequence for row in source.rows],
        identity=settings.identity,
        coverage=settings.coverage,
        artifacts=artifacts,
        say=say,
    )


def _warn_of_fractions(split: Split, settings: SplitSettings) -> Iterator[str]:
    """Says where large clusters keep a part away from what was asked."""
    rows = len(split.training) + len(split.validation) + len(split.test)
    for part, asked in (
        ("validation", settings.validation_fraction),
        ("test", settings.test_fraction),
    ):
        found = len(getattr(split, part)) / rows
        if abs(found - asked) > _FAR * asked:
            yield (
                f"the {part} part has {100 * found:.1f} % of the rows, {100 * asked:g} % were "
                "asked for: clusters of similar sequences stay whole"
            )


# --- rows and problems ---------------------------------------------------------------------------


def _read_source(settings: DataSettings, folder: Path) -> Source:
    """The rows of the source, checked: of usable length, each sequence once, both labels."""
    problems = Problems()
    source = load_source(settings, folder, problems)
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
        left_out=len(source.rows) - len(rows),
    )


def _nucleotide_warnings(rows: Sequence[Row]) -> list[str]:
    """One loud sentence where sequences look like DNA: its letters are residues, too."""
    found = [row for row in rows if ONLY_NUCLEOTIDES.fullmatch(row.sequence)]
    if len(found) < len(rows):
        found = [row for row in found if len(row.sequence) >= NUCLEOTIDE_LENGTH]
    if not found:
        return []
    first = found[0]
    warning = (
        f"DNA, NOT PROTEINS? {len(found):,} of {len(rows):,} sequences have only the letters "
        f"{NUCLEOTIDES} (the first in {first.file}, {first.place}: {shortened(first.sequence)}). "
        "They are read as amino acids; if they are DNA or RNA, no result means anything: "
        "translate them into proteins first"
    )
    return [warning]


def _fit_length(
    rows: Sequence[Row], settings: DataSettings, problems: Problems
) -> tuple[list[Row], list[str]]:
    """Cuts what is longer than `max_length` where the study file says so."""
    limit = settings.max_length
    if settings.truncate is not None:
        cut = [
            replace(
                row,
                sequence=truncated(row.sequence, limit, settings.truncate),
                whole=row.sequence,
            )
            for row in rows
        ]
        count = sum(len(row.sequence) > limit for row in rows)
        were = counted(count, "sequence was", "sequences were")
        kept = kept_in_words(limit, settings.truncate)
        return cut, [f"{were} cut to the {kept} residues"] * (count > 0)
    everything: tuple[Row | Refused, ...] = (*rows, *problems.refused)
    too_long = [row for row in everything if len(row.sequence) > limit]
    # Rows that were refused for something else count, too: this is to be the length that fits all.
    longest = max((len(row.sequence) for row in too_long), default=0)
    kind = Kind(
        several=f"sequences longer than max_length, which is {limit}",
        remedy=f"set max_length = {longest} in [data] (the longest has that many), or "
        'truncate = "end" to keep its first residues ("start": its last, "middle": both ends)',
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


def _where(first: Row, row: Row) -> str:
    """Where `first` stands, in a message about `row`."""
    return first.place if first.file == row.file else f"{first.file}, {first.place}"


def _without_repeats(
    rows: Sequence[Row], settings: DataSettings, problems: Problems
) -> tuple[list[Row], list[str]]:
    """Keeps the first of equal sequences; contradicting labels are problems, or left out."""
    first_rows: dict[str, Row] = {}
    what, kept = "sequence", ""
    if settings.truncate is not None:
        # What the network sees decides: two proteins that differ only in what is cut are one.
        kept = kept_in_words(settings.max_length, settings.truncate)
        what = f"sequence (its {kept} residues)"
    conflicting: set[str] = set()
    in_two_parts: list[tuple[Row, Row]] = []
    for row in rows:
        first = first_rows.setdefault(row.sequence, row)
        # With folds, a row that is kept once is in one fold, whatever part it was said to be in.
        judged = settings.split.folds is None or "test" in (first.part, row.part)
        if first.part != row.part and judged:
            in_two_parts.append((first, row))
            # Different proteins that are equal as they are cut: what judges is kept.
            if first.whole != row.whole and _RANKS[row.part] > _RANKS[first.part]:
                first_rows[row.sequence] = row
        if first.label == row.label:
            continue
        conflicting.add(row.sequence)
        if settings.conflicts == "drop":
            continue
        where = _where(first, row)
        problems.add_one(
            BOTH_LABELS,
            row.file,
            f"{row.place} says {row.label}, but the same {what} has label {first.label} in {where}",
            place=row.place,
            detail=f"{row.label}, but {first.label} in {where}",
            line=row.line,
            key="label",
            value=str(row.label),
        )
    cut: set[str] = set()
    for first, row in in_two_parts:
        if settings.conflicts == "drop" and row.sequence in conflicting:
            continue
        if first.whole != row.whole:
            cut.add(row.sequence)
            continue
        where = _where(first, row)
        problems.add_one(
            TWO_PARTS,
            row.file,
            f"{row.place} is in the {row.part} part, but the same {what} is in the {first.part} "
            f"part in {where}",
            place=row.place,
            detail=f"{row.part}, but {first.part} in {where}",
            line=row.line,
            key=settings.split.column or "sequence",
            value=str(row.part),
        )
    warnings = []
    if cut:
        are = counted(len(cut), f"{what} is", f"sequences (their {kept} residues) are")
        warnings.append(
            f"{are} in two parts of the split, of proteins that differ elsewhere: kept in test "
            "rather than in validation, and in validation rather than in training; a larger "
            "max_length tells them apart"
        )
    if conflicting and settings.conflicts == "drop":
        both = counted(len(conflicting), "sequence has", "sequences have")
        left = [row for row in rows if row.sequence not in conflicting]
        dropped = counted(len(rows) - len(left), "row")
        warnings.append(f"{both} both labels: left out, {dropped} in all")
        rows = left
        for sequence in conflicting:
            del first_rows[sequence]
    repeats = len(rows) - len(first_rows)
    if not repeats:
        return list(rows), warnings
    repeat = counted(repeats, "row repeats", "rows repeat")
    warning = f"{repeat} an earlier {what} with the same label: left out"
    if settings.columns.weight is not None:
        warning += ", the weight of the first counts"
    return list(first_rows.values()), [*warnings, warning]
