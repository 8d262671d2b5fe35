"""What is wrong with a data file, counted by kind, with the first places of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tuner.data.rows import RESIDUES, UNKNOWN_RESIDUES
from tuner.errors import DataError, Problem, counted

SHOWN_PROBLEMS = 5  # of one kind, each with its place; the rest are counted
SHOWN_VALUES = 10  # different wrong values of one kind, the most frequent first
SHOWN_POSITIONS = 5  # of one wrong letter in one sequence


SHOWN_CHARACTERS = 40  # of a wrong value


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What many rows can have wrong with them: told once for all rows of a file."""

    several: str  #: the rows, in the plural
    remedy: str


WRONG_LABEL = Kind(
    several="labels that are neither 1 nor 0",
    remedy="write 1 (soluble) or 0 (insoluble); soluble/insoluble, true/false and yes/no can be "
    "used, too",
)
MIXED_LABELS = Kind(
    several="labels of another kind than those before",
    remedy="write all labels of the file in the same way",
)
WRONG_WEIGHT = Kind(
    several="weights that are not numbers above 0",
    remedy="write a finite number above 0; remove a row that should not count",
)
WRONG_RESIDUE = Kind(
    several="sequences with letters that are not residues",
    remedy=f"only {RESIDUES} can be used (20 residues, one letter each): correct or remove it; "
    f'unknown = "mask" in [data] accepts {UNKNOWN_RESIDUES}, and leaves these positions out',
)
NOTHING_KNOWN = Kind(
    several="sequences of unknown residues alone", remedy="remove it, or add its residues"
)
RNA = Kind(
    several="sequences that look like RNA (letters ACGTUN alone)",
    remedy=f"only {RESIDUES} can be used: translate RNA into amino acids",
)
EMPTY = Kind(several="empty sequences", remedy="remove it, or add its residues")
WRONG_FIELDS = Kind(several="rows with too few or too many fields", remedy="correct the row")
SEVERAL_LINES = Kind(
    several="quoted fields that run over lines and may hold rows of the file",
    remedy="close or remove the quote, or write the field on one line",
)
SEVERAL_LINES_TSV = Kind(
    several="quoted fields that run over lines, where a TSV record is one line",
    remedy="close or remove the quote, or write the field on one line",
)
NO_ID = Kind(several="headers without an id", remedy="write >NAME")
REPEATED_ID = Kind(
    several="ids that stand in an earlier line already", remedy="rename or remove one of the two"
)
BOTH_LABELS = Kind(
    several="sequences that have the other label in an earlier row",
    remedy='remove one of the two, or both; conflicts = "drop" in [data] leaves out all rows of '
    "such sequences",
)
NO_PART = Kind(
    several="rows without a value in the column of the split",
    remedy="write which part the row is in, or remove the row",
)
NO_FOLD = Kind(
    several="rows without a value in the column of the folds",
    remedy="write which fold the row is in, or remove the row",
)
UNKNOWN_PART = Kind(
    several="values in the column of the split that no part of [data.split] names",
    remedy="name the value in training, validation or test of [data.split], or leave training "
    "out, which then has all other values",
)
TWO_PARTS = Kind(
    several="sequences that are in another part of the split, too",
    remedy="remove one of the two, or write the same part for both: what a network trained on "
    "must not judge it",
)
WRONG_TOKEN = Kind(several="rows with impossible tokens", remedy="write 0 to 20")
PADDING_INSIDE = Kind(
    several="rows with padding (0) inside the sequence", remedy="padding stands at the end only"
)
NO_TOKENS = Kind(several="rows that are empty sequences", remedy="remove it")


@dataclass(slots=True, kw_only=True)
class _Group:
    """The problems of one kind in one column of one file."""

    first: Problem  #: in words that fit one row
    kind: Kind  #: what all of them are
    count: int = 0  #: rows
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
                listed = ", ".join(f"{value} {times(count)}" for value, count in values)
                others = len(self.values) - len(values)
                message += f"; in all {listed}" + (f", and {others:,} others" if others else "")
        return replace(self.first, count=self.count, message=f"{message}; {self.kind.remedy}")


def times(count: int) -> str:
    """How often, in words."""
    return "once" if count == 1 else counted(count, "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A row that is left out for one reason, and may also be too long."""

    file: str  #: as the study file names it
    line: int | None  #: as in `Row`, like `place`
    place: str
    sequence: str  #: as it stands in the file; in npz with "-" for impossible tokens


class Problems:
    """Collects what is wrong with a source, to be reported at once."""

    def __init__(self) -> None:
        self._listed: list[Problem | _Group] = []
        self._groups: dict[tuple[str, str, Kind], _Group] = {}
        self.refused: list[Refused] = []  #: whether they are too long is told nevertheless

    def __bool__(self) -> bool:
        return bool(self._listed)

    def add(
        self, file: str, message: str, *, line: int | None = None, key: str = "", value: str = ""
    ) -> None:
        """Lists a problem that stands for itself."""
        self._listed.append(
            Problem(file=file, line=line, key=key, value=shortened(value), message=message)
        )

    def add_one(
        self,
        kind: Kind,
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
            first = Problem(file=file, line=line, key=key, value=shortened(value), message=message)
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


def listed(names: Iterable[str]) -> str:
    """The names of columns as messages show them, without what a terminal would take for orders."""
    return shortened("".join(one if one.isprintable() else "?" for one in ", ".join(names)))


def shortened(value: str) -> str:
    """A text as messages show it: its first characters."""
    return value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}..."
