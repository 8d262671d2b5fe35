"""Labels and weights as tables write them."""

from __future__ import annotations

import math
import re
from collections import Counter

from tuner.data.problems import (
    MIXED_LABELS,
    WRONG_LABEL,
    WRONG_WEIGHT,
    Kind,
    Problems,
    shortened,
)
from tuner.errors import counted

#: The words for 1 (soluble) and 0 (insoluble), in lower case. One file has words of one row.
VOCABULARIES = (("1", "0"), ("true", "false"), ("yes", "no"), ("soluble", "insoluble"))
WORDS = {
    word: (vocabulary, 1 - at)
    for vocabulary, pair in enumerate(VOCABULARIES)
    for at, word in enumerate(pair)
}
_WITH_DECIMALS = re.compile(r"([01])\.0*")


class LabelReader:
    """Reads the labels of one file, which have to be of one vocabulary."""

    def __init__(self, file: str, problems: Problems) -> None:
        """What is not a label is added to `problems`."""
        self._file = file
        self._problems = problems
        self._first: tuple[int, str, str] | None = None  # its vocabulary, word and place
        self._words: Counter[int] = Counter()  # labels by vocabulary

    @property
    def known(self) -> frozenset[str]:
        """The words that mean a label in this file as far as it was read, in lower case."""
        first = 0 if self._first is None else self._first[0]
        return frozenset((*VOCABULARIES[0], *VOCABULARIES[first]))

    def read(self, text: str, line: int, place: str) -> int | None:
        """1 (soluble), 0 (insoluble), or None where it is not a label."""
        found = WORDS.get(plain_word(text))
        shown = repr(shortened(text.strip()))
        if found is None:
            self._add(WRONG_LABEL, f"{shown} is not a label", shown, line, place, text)
            return None
        vocabulary, label = found
        if self._first is None:
            self._first = vocabulary, shown, place
        if vocabulary != self._first[0]:
            _, word, first_place = self._first
            what = f"{shown} in {place} is a label of another kind than {word} in {first_place}"
            detail = f"{shown}, but {word} in {first_place}"
            self._add(MIXED_LABELS, what, detail, line, place, text)
            return None
        self._words[vocabulary] += 1
        return label

    def _add(self, kind: Kind, what: str, detail: str, line: int, place: str, text: str) -> None:
        self._problems.add_one(
            kind,
            self._file,
            what,
            place=place,
            detail=detail,
            line=line,
            key="label",
            value=text.strip(),
            values={repr(shortened(text.strip())): 1},
        )

    def warnings(self) -> list[str]:
        """A sentence if the labels are words."""
        return [
            f"{counted(count, 'label is a word', 'labels are words')}: "
            f"{' and '.join(VOCABULARIES[vocabulary])} are read as 1 and 0"
            for vocabulary, count in self._words.items()
            if vocabulary
        ]


def plain_word(text: str) -> str:
    """A label as `WORDS` has it: lower case, without spaces around it, 1.0 as 1."""
    word = text.strip().lower()
    decimal = _WITH_DECIMALS.fullmatch(word)
    return decimal[1] if decimal else word


def read_weight(text: str, file: str, line: int, place: str, problems: Problems) -> float | None:
    """A number above 0; None, with a problem added, where it is not one."""
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if 0 < weight < math.inf:
        return weight
    shown = repr(shortened(text.strip()))
    problems.add_one(
        WRONG_WEIGHT,
        file,
        f"{shown} is not a weight",
        place=place,
        detail=shown,
        line=line,
        key="weight",
        value=text.strip(),
        values={shown: 1},
    )
    return None
