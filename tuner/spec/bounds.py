"""How tight and how large the networks of a space are."""

from __future__ import annotations

import math
import random

from tuner.spec.architecture import KEYS, ModelConfig, parameter_count
from tuner.spec.hyperparameter import GREATEST, ParameterValue
from tuner.spec.space import Choices, Dimension, Integers, SearchSpace, greatest

SAMPLED_CONFIGURATIONS = 1_000  #: takes 0.1 s where a network has three blocks


def tightest(space: SearchSpace) -> ModelConfig:
    """The configuration of `space` that leaves the fewest positions at every block.

    What leaves fewer (`Hyperparameter.shortens`) is chosen for each hyperparameter by itself, so
    one configuration has it all.
    """

    def pick(name: str, dimension: Dimension) -> ParameterValue:
        shortens = KEYS[name.rpartition(".")[2]].shortens
        if shortens == GREATEST:
            return greatest(dimension)
        if shortens is not None and dimension.contains(shortens):
            return shortens
        return dimension.middle

    return space.resolve_with(pick)


def sampled_configurations(space: SearchSpace) -> tuple[ModelConfig, ...]:
    """Configurations sampled as a random search samples them; of a fixed space, the only one.

    The same space gives the same. Numbers that are not whole have their middle.
    """
    generator = random.Random(0)  # noqa: S311 - no secret

    def pick(_: str, dimension: Dimension) -> ParameterValue:
        if isinstance(dimension, Choices):
            return generator.choice(dimension.choices)
        if not isinstance(dimension, Integers):
            return dimension.middle  # no number that is not whole changes a shape
        low, high = dimension.low, dimension.high
        if dimension.log:  # as Optuna samples it
            drawn = math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return min(max(round(drawn), low), high)
        return generator.randrange(low, high + 1, dimension.step)

    return tuple(
        space.resolve_with(pick) for _ in range(SAMPLED_CONFIGURATIONS if space.parameters else 1)
    )


def parameter_counts(space: SearchSpace, max_length: int) -> dict[str, int]:
    """The `parameter_count` of `sampled_configurations`.

    Args:
        space: A space of which no configuration has `misfits`.
        max_length: Tokens in a row.

    Returns:
        "min", "median" and "max" (weights), and "sampled", the number of configurations.
    """
    counts = sorted(parameter_count(config, max_length) for config in sampled_configurations(space))
    return {
        "min": counts[0],
        "median": counts[len(counts) // 2],
        "max": counts[-1],
        "sampled": len(counts),
    }
