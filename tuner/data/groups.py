"""Rows that stay together, divided among parts: clusters of similar sequences.

Largest clusters first, each goes to a part by chance: in proportion to what the part still lacks of
the rows of the cluster's labels, among the parts in which it has room. So every part gets clusters
of every size, its rows and labels come close to what was asked, and the seed decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from tuner.data.rows import Row

Part = TypeVar("Part", bound=Hashable)

_ROOM = 0.5  #: rows by which a part may be exceeded: shares are no whole numbers


def divide_groups(
    rows: Sequence[Row],
    groups: Sequence[int],
    shares: Mapping[Part, float],
    order: Callable[[Row], bytes],
) -> dict[Part, list[Row]]:
    """The rows of each part; all rows of a group are in one.

    Args:
        rows: What is divided.
        groups: The group of each row, [n].
        shares: Of all rows, 0..1, by part; they add up to 1.
        order: At least 8 bytes of chance for each row, which do not depend on the rows' order.
    """
    members: dict[int, list[Row]] = defaultdict(list)
    for row, group in zip(rows, groups, strict=True):
        members[group].append(row)
    lacking = {
        part: [share * sum(row.label == label for row in rows) for label in (0, 1)]
        for part, share in shares.items()
    }
    parts: dict[Part, list[Row]] = {part: [] for part in shares}
    chances = {group: min(map(order, its)) for group, its in members.items()}
    for group in sorted(members, key=lambda one: (-len(members[one]), chances[one])):
        its = members[group]
        counts = [sum(row.label == label for row in its) for label in (0, 1)]
        part = _part_of(counts, lacking, chances[group])
        parts[part] += its
        for label in (0, 1):
            lacking[part][label] -= counts[label]
    return parts


def _part_of(counts: list[int], lacking: Mapping[Part, list[float]], chance: bytes) -> Part:
    """The part of a group with `counts` rows of label 0 and 1, where parts lack so many of each."""

    def wanted(part: Part) -> float:
        return sum(
            count * max(lack, 0.0) for count, lack in zip(counts, lacking[part], strict=True)
        )

    roomy = [
        part
        for part, lacks in lacking.items()
        if all(count <= lack + _ROOM for count, lack in zip(counts, lacks, strict=True) if count)
    ]
    total = sum(map(wanted, roomy))
    if not total > 0:
        return max(lacking, key=lambda part: (wanted(part), sum(lacking[part])))
    drawn = int.from_bytes(chance[:8], "big") / 2**64 * total
    for part in roomy:
        drawn -= wanted(part)
        if drawn < 0:
            return part
    return roomy[-1]
