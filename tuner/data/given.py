"""A split that the data names: the column whose values say which part a row is in."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tuner.data.problems import NO_PART, UNKNOWN_PART, Problems, shortened, times
from tuner.spec.spec import value_key

if TYPE_CHECKING:
    from tuner.spec.spec import SplitPart, SplitSettings

_SHOWN_VALUES = 10  #: of a column, the most frequent first


class PartReader:
    """Reads the parts of the rows of one file."""

    def __init__(self, file: str, split: SplitSettings, problems: Problems) -> None:
        """What names no part is added to `problems`."""
        self._file = file
        self._split = split
        self._problems = problems
        self._values: Counter[str] = Counter()  # rows of each value, as it is first written

    def read(self, text: str, line: int, place: str) -> SplitPart | None:
        """The part that a value names; None, with a problem added, where it names none."""
        value = text.strip()
        if not value:
            self._problems.add_one(
                NO_PART,
                self._file,
                f"no value in the column {self._split.column!r}",
                place=place,
                line=line,
                key=str(self._split.column),
            )
            return None
        self._values[value] += 1
        part = self._split.part_of(value)
        if part is None:
            shown = repr(shortened(value))
            self._problems.add_one(
                UNKNOWN_PART,
                self._file,
                f"{shown} is none of the values that training, validation and test name",
                place=place,
                detail=shown,
                line=line,
                key=str(self._split.column),
                value=value,
                values={shown: 1},
            )
        return part

    def check_names(self) -> None:
        """Adds a problem for each value that the study file names and no row has."""
        if not self._values:
            return
        found = {value_key(value) for value in self._values}
        for part in ("training", "validation", "test"):
            named = getattr(self._split, part)
            for value in named if isinstance(named, list) else ():
                if value_key(value) not in found:
                    self._problems.add(
                        self._file,
                        f"no row has the value {shortened(value)!r} in the column "
                        f"{self._split.column!r}, which {part} in [data.split] names; the column "
                        f"has {self._listed()}: name values of those",
                        key=str(self._split.column),
                        value=value,
                    )

    def _listed(self) -> str:
        values = self._values.most_common(_SHOWN_VALUES)
        listed = ", ".join(f"{shortened(value)!r} {times(count)}" for value, count in values)
        others = len(self._values) - len(values)
        return listed + (f" and {others:,} others" if others else "")
