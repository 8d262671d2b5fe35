"""The smallest and largest network of a space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast

import numpy as np

from tuner.spec.architecture import (
    NORMALIZATION_WEIGHTS,
    TOKENS,
    BlockConfig,
    ModelConfig,
    block_parameters,
    dense_parameters,
    parameter_count,
)
from tuner.spec.space import (
    Choices,
    Counts,
    Dimension,
    Entry,
    Integers,
    ParameterValue,
    SearchSpace,
    greatest,
    least,
    values,
)


def tightest(space: SearchSpace) -> ModelConfig:
    """The configuration of `space` that leaves the fewest positions at every block.

    Fewer positions follow from larger kernels and pools, more blocks, "valid" padding, stacking,
    and a network that is not padded at its end; each is chosen by itself, so one configuration
    has them all.
    """
    prefers: Mapping[str, ParameterValue] = {
        "arrangement": "stacked",
        "padding": "valid",
        "masking": False,
        "head": "flatten",
    }

    def pick(name: str, dimension: Dimension) -> ParameterValue:
        key = name.rpartition(".")[2]
        if key in ("blocks", "kernel_size", "pool_size"):
            return greatest(dimension)
        if key in prefers and dimension.contains(prefers[key]):
            return prefers[key]
        return dimension.middle

    return space.resolve_with(pick)


def parameter_count_range(space: SearchSpace, max_length: int) -> tuple[int, int]:
    """The smallest and the largest `parameter_count` in `space`, exact.

    Args:
        space: A space of which no configuration has `misfits`.
        max_length: Tokens in a row.
    """
    structures = _structures(space)
    smallest = min(_extreme_count(space, max_length, fixed, min) for fixed in structures)
    largest = max(_extreme_count(space, max_length, fixed, max) for fixed in structures)
    return smallest, largest


def _structures(space: SearchSpace) -> list[dict[str, ParameterValue]]:
    """All combinations of what the count neither only grows nor only falls with, but `blocks`."""
    entries = dict(space.entries)
    searched = {
        name: values(entry)
        for name in ("head", "arrangement")
        if isinstance(entry := entries[name], Integers | Choices)
    }
    return [dict(zip(searched, values, strict=True)) for values in product(*searched.values())]


def _extreme_count(
    space: SearchSpace,
    max_length: int,
    fixed: Mapping[str, ParameterValue],
    extreme: Callable[..., Any],  #: `min` or `max`
) -> int:
    """The extreme count where the structure is `fixed`.

    The count grows with everything else but pooling, "valid" padding and the kernel's width. The
    first two only shorten what a flatten head sees. The kernel does both: longer ones cost
    weights and, where padding is "valid", leave fewer positions, so all of them are tried. So are
    all numbers of blocks: a smaller network is the beginning of the largest.
    """
    numbers = cast(Sequence[int], values(dict(space.entries)["blocks"]))
    fixed = {**fixed, "blocks": max(numbers)}
    kernels: dict[str, Dimension] = {}
    cost: Mapping[str, Callable[[Any], int]] = {
        "pool_size": lambda size: -size,
        "padding": lambda padding: padding == "same",
        "normalization": NORMALIZATION_WEIGHTS.__getitem__,
        "residual": lambda residual: residual == "projected",
    }

    def pick(name: str, dimension: Dimension) -> ParameterValue:
        key = name.rpartition(".")[2]
        if name in fixed:
            return fixed[name]
        if key == "kernel_size":
            kernels[name.partition(".")[0]] = dimension
        if key in cost and isinstance(dimension, Choices):
            return cast(ParameterValue, extreme(dimension.choices, key=cost[key]))
        ends = (least(dimension), greatest(dimension))
        return cast(ParameterValue, extreme(ends, key=cost.get(key)))

    config = space.resolve_with(pick)
    if config.head != "flatten":
        first = (replace(config, blocks=config.blocks[:number]) for number in numbers)
        return int(extreme(parameter_count(one, max_length) for one in first))
    stacked = config.arrangement == "stacked"
    per_feature = config.dense[0].units if config.dense else 1
    better, unreachable = (np.minimum, _FAR) if extreme is min else (np.maximum, -_FAR)
    start = np.full(max_length + 1, unreachable)
    start[max_length] = 0
    # Convolution weights by positions left: of the blocks so far, or in parallel of one alone.
    by_length, channels, beside = start, config.embedding_dim, 0
    counts: dict[int, int] = {}
    for number, block in enumerate(config.blocks, start=1):
        sizes = kernels.get(f"block{number}", block.kernel_size)
        later = config.blocks[number - 1 :] if stacked else (block,)
        after = _weights_after(
            by_length,
            block,
            channels,
            _kernels_to_try(sizes, math.prod(one.pool_size for one in later)),
            better,
        )
        (left,) = np.nonzero(np.abs(after) < _FAR)
        counts[number] = int(extreme(after[left] + left * (block.filters * per_feature)))
        if stacked:
            by_length, channels = after, block.filters
        else:
            counts[number] = beside = beside + counts[number]
    count = TOKENS * config.embedding_dim + dense_parameters(config, 0)
    return count + int(extreme(counts[number] for number in numbers))


def _kernels_to_try(sizes: Entry, period: int) -> Sequence[int]:
    """The kernels among `sizes` that can give an extreme count.

    A kernel that is longer by the product of the pool sizes from its block on, the `period`,
    leaves exactly one position fewer at the end, so the count is linear in steps of it: of the
    kernels that are alike modulo the period the shortest and the longest are enough.
    """
    if isinstance(sizes, Integers):
        return range(sizes.low, sizes.high + 1, sizes.step)
    ends: dict[int, tuple[int, int]] = {}
    for size in cast(Sequence[int], values(sizes)):
        low, high = ends.get(size % period, (size, size))
        ends[size % period] = min(low, size), max(high, size)
    return sorted({size for pair in ends.values() for size in pair})


_FAR = np.int64(2**61)  #: beyond any count; a length that no choice of kernels leaves has this


def _weights_after(
    before: Counts,
    block: BlockConfig,
    channels: int,
    kernel_sizes: Sequence[int],
    better: np.ufunc,
) -> Counts:
    """The extreme convolution weights of the blocks up to this one, by the positions left.

    With "valid" padding a kernel of k leaves m = L - k + 1 positions and costs b + a k weights, so
    that extreme(w[L] + b + a k) over all k is b - a (m - 1) + extreme(w[L] + a L): of a window of
    lengths, whose extremes take log(kernels) passes instead of one for each kernel.

    Args:
        before: The weights before this block, int64 [max_length + 1], by the positions left.
        block: Its `kernel_size` is not looked at.
        channels: Its input's.
        kernel_sizes: Those that it may have, rising.
        better: `np.minimum` or `np.maximum`.
    """
    unreachable = _FAR if better is np.minimum else -_FAR
    lengths = np.arange(len(before))
    slope = channels * block.filters
    base = block_parameters(replace(block, kernel_size=0), channels)
    if block.padding == "same":
        ends = (slope * min(kernel_sizes), slope * max(kernel_sizes))
        after = before + base + better(*ends)
    else:
        rising = before + slope * lengths
        best = np.full_like(before, unreachable)
        for first, step, count in _progressions(kernel_sizes):
            best = better(best, _window(rising, first - 1, step, count, better, unreachable))
        after = best + base - slope * (lengths - 1)
    after[np.abs(after) > _FAR // 2] = unreachable
    padded = np.full(-(-len(after) // block.pool_size) * block.pool_size, unreachable)
    padded[: len(after)] = after
    pooled: Counts = better.reduce(padded.reshape(-1, block.pool_size), axis=1)
    return pooled


def _window(
    values: Counts, offset: int, step: int, count: int, better: np.ufunc, outside: np.int64
) -> Counts:
    """For each i the extreme of values[i + offset + step j] with j = 0 .. count - 1."""

    def moved(array: Counts, by: int) -> Counts:
        found = np.full_like(array, outside)
        if by < len(array):
            found[: len(array) - by] = array[by:]
        return found

    best, width = moved(values, offset), 1
    while 2 * width <= count:
        best = better(best, moved(best, width * step))
        width *= 2
    widest: Counts = better(best, moved(best, (count - width) * step))
    return widest


def _progressions(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Rising numbers as arithmetic progressions: first, step, how many."""
    if isinstance(numbers, range):
        yield numbers.start, numbers.step, len(numbers)
        return
    at = 0
    while at < len(numbers):
        end = min(at + 2, len(numbers))
        step = numbers[end - 1] - numbers[at] if end - at == 2 else 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        yield numbers[at], step, end - at
        at = end
