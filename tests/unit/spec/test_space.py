"""Search spaces, length arithmetic and parameter counts, without TensorFlow."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.errors import StudyError
from tuner.spec.architecture import (
    KEYS,
    ModelConfig,
    misfits,
    padded_length,
    parameter_count,
    positions_after_blocks,
)
from tuner.spec.bounds import parameter_counts, tightest
from tuner.spec.hyperparameter import ParameterValue, choice, penalty, rate, whole
from tuner.spec.mistakes import toml_value
from tuner.spec.space import (
    BLOCK_KEYS,
    DENSE_KEYS,
    Choices,
    Dimension,
    Floats,
    Integers,
    SearchSpace,
    space_of,
)

# Hypothesis' own deadline and randomness would make a slow machine, or bad luck, a failure.
same_every_time = settings(deadline=None, derandomize=True)
few = settings(same_every_time, max_examples=50)

#: Section 4 of the design, as entries.
DESIGN = SearchSpace.of(
    {
        "embedding_dim": Choices(choices=(8, 16, 32, 64)),
        "blocks": Integers(low=1, high=3),
        "kernel_size": Integers(low=3, high=11, step=2),
        "filters": Choices(choices=(16, 32, 64, 128)),
        "normalization": Choices(choices=("none", "batch", "layer")),
        "activation": Choices(choices=("relu", "tanh", "gelu", "swish")),
        "pool_size": Integers(low=2, high=4),
        "conv_dropout": Floats(low=0.0, high=0.3),
        "head": Choices(choices=("flatten", "global_max", "global_average", "global_both")),
        "dense_layers": Integers(low=1, high=2),
        "units": Choices(choices=(32, 64, 128, 256)),
        "dense_dropout": Floats(low=0.05, high=0.35),
        "conv_l2": Floats(low=1e-6, high=1e-1, log=True),
        "dense_l2": Floats(low=1e-6, high=1e-1, log=True),
        "learning_rate": Floats(low=3e-4, high=5e-3, log=True),
        "batch_size": Choices(choices=(16, 32, 64, 128)),
        "block1.pool_size": 4,
    }
)

CHAPTER = SearchSpace.of(
    {
        "blocks": 3,
        "kernel_size": 3,
        "filters": 16,
        "padding": "valid",
        "masking": False,
        "pool_size": 2,
        "head": "flatten",
        "dense_layers": 2,
        "dense_dropout": 0.0,
        "block1.kernel_size": 5,
        "block1.pool_size": 4,
        "dense1.units": 256,
        "dense2.units": 64,
    }
).resolve({})


class SpyTrial:
    """Suggests from a seeded generator and notes what was asked."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.params: dict[str, ParameterValue] = {}

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return self._note(name, range(low, high + 1, step))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        grid = [low + k * step for k in range(round((high - low) / step) + 1)] if step else None
        return self._note(name, grid or [low, (low + high) / 2, high])

    def suggest_categorical(self, name: str, choices: Sequence[ParameterValue]) -> Any:
        return self._note(name, choices)

    def _note(self, name: str, values: Sequence[Any]) -> Any:
        assert name not in self.params, "one suggest a parameter"
        self.params[name] = self._random.choice(values)
        return self.params[name]


# Strategies.


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    """Any configuration, small enough to count by hand."""
    entries: dict[str, Any] = {}
    for name, key in KEYS.items():
        if name in ("blocks", "dense_layers"):
            entries[name] = draw(st.integers(key.low, 4))
    for name, key in KEYS.items():
        kinds = [f"block{n + 1}" for n in range(entries["blocks"])] if key.of_block else []
        kinds += [f"dense{n + 1}" for n in range(entries["dense_layers"])] if key.of_dense else []
        for layer in ["", *kinds, *(["output"] if name == "dense_dropout" else [])]:
            entries.setdefault(f"{layer}.{name}" if layer else name, draw(values_of(name)))
    return SearchSpace.of(entries).resolve({})


def values_of(name: str) -> st.SearchStrategy[Any]:
    key = KEYS[name]
    if key.kind == "boolean":
        return st.booleans()
    if key.kind == "choice":
        return st.sampled_from(key.choices)
    if key.kind == "number":
        return st.sampled_from([0.001, 0.25, 0.5])
    return st.integers(int(max(key.low, 1)), 6)


@st.composite
def small_spaces(draw: st.DrawFn) -> SearchSpace:
    """Spaces of which every configuration can be listed."""

    def some(values: Sequence[Any]) -> Any:
        chosen = draw(st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True))
        return Choices(choices=tuple(chosen)) if len(chosen) > 1 else chosen[0]

    entries = {
        "embedding_dim": some([1, 3]),
        "masking": some([True, False]),
        "arrangement": some(["stacked", "parallel"]),
        "blocks": some([1, 2, 3]),
        "kernel_size": Integers(low=1, high=draw(st.integers(1, 4))),
        "filters": some([2, 5]),
        "padding": some(["same", "valid"]),
        "normalization": some(["none", "batch", "layer"]),
        "residual": some(["none", "identity", "projected"]),
        "pool_size": some([1, 2, 3]),
        "head": some(["flatten", "global_max", "global_both"]),
        "dense_layers": some([0, 1, 2]),
        "units": some([1, 4]),
    }
    if draw(st.booleans()):
        entries["block2.padding"] = some(["same", "valid"])
        entries["block1.pool_size"] = some([1, 4])
    return SearchSpace.of(entries)


def every_configuration(space: SearchSpace) -> list[ModelConfig]:
    """All of them, by picking in every way, depth first."""
    found: list[ModelConfig] = []
    open_picks: list[list[ParameterValue]] = [[]]
    while open_picks:
        picks = open_picks.pop()
        remaining = iter(picks)
        branched = False

        def pick(
            name: str,
            dimension: Dimension,
            picks: list[ParameterValue] = picks,
            remaining: Any = remaining,
        ) -> ParameterValue:
            nonlocal branched
            for value in remaining:
                return value
            values = (
                dimension.choices
                if isinstance(dimension, Choices)
                else range(int(dimension.low), int(dimension.high) + 1)
            )
            if not branched:
                branched = True
                open_picks.extend([*picks, value] for value in values)
            return values[0]

        config = space.resolve_with(pick)
        if not branched:
            found.append(config)
    return found


# Sampling.


def test_the_space_of_the_design_has_22_parameters_in_the_order_of_sampling():
    assert list(DESIGN.parameters) == [
        "embedding_dim",
        "blocks",
        "block1.kernel_size",
        "block1.filters",
        "normalization",
        "activation",
        "conv_dropout",
        "conv_l2",
        "block2.kernel_size",
        "block2.filters",
        "block2.pool_size",
        "block3.kernel_size",
        "block3.filters",
        "block3.pool_size",
        "head",
        "dense_layers",
        "dense1.units",
        "dense_dropout",
        "dense_l2",
        "dense2.units",
        "learning_rate",
        "batch_size",
    ]


@same_every_time
@given(seed=st.integers(0, 10_000))
def test_a_trial_samples_just_the_parameters_that_exist_in_their_order(seed):
    trial = SpyTrial(seed)
    config = DESIGN.suggest(trial)
    absent = {f"block{n}" for n in range(len(config.blocks) + 1, 4)}
    absent |= {f"dense{n}" for n in range(len(config.dense) + 1, 3)}
    expected = [name for name in DESIGN.parameters if name.partition(".")[0] not in absent]
    assert list(trial.params) == expected


@same_every_time
@given(seed=st.integers(0, 10_000))
def test_recorded_parameters_resolve_to_what_was_sampled(seed):
    trial = SpyTrial(seed)
    config = DESIGN.suggest(trial)
    assert DESIGN.resolve(trial.params) == config


def test_optuna_samples_a_space_and_its_record_resolves_to_the_same():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    space = SearchSpace.of(
        {
            "masking": Choices(choices=(True, False)),
            "filters": Integers(low=2, high=200, log=True),
            "conv_dropout": Floats(low=0.0, high=0.3, step=0.1),
            "optimizer": Choices(choices=("adam", "sgd")),
            "blocks": Integers(low=1, high=2),
        }
    )
    for _ in range(8):
        trial = study.ask()
        config = space.suggest(trial)
        frozen = study.trials[trial.number]
        assert space.resolve(frozen.params) == config


def test_a_value_that_all_blocks_share_is_asked_for_once():
    space = SearchSpace.of({"blocks": 3, "conv_dropout": Floats(low=0.0, high=0.5)})
    trial = SpyTrial()
    config = space.suggest(trial)
    assert list(trial.params) == ["conv_dropout"]
    assert len({block.conv_dropout for block in config.blocks}) == 1


def test_an_override_is_a_parameter_of_its_own():
    space = SearchSpace.of(
        {
            "conv_dropout": 0.1,
            "block2.conv_dropout": Floats(low=0.2, high=0.3),
            "output.dense_dropout": Choices(choices=(0.4,)),
        }
    )
    config = space.suggest(SpyTrial())
    assert list(space.parameters) == ["block2.conv_dropout", "output.dense_dropout"]
    assert config.blocks[0].conv_dropout == 0.1
    assert config.blocks[1].conv_dropout >= 0.2
    assert (config.dense[0].dense_dropout, config.output_dropout) == (0.2, 0.4)


def test_penalties_of_dense_layers_do_not_exist_without_dense_layers():
    space = SearchSpace.of({"dense_layers": 0, "dense_l2": Floats(low=0.0, high=1.0)})
    assert list(space.parameters) == []
    assert space.resolve({}).dense == ()


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({}, "no 'filters'"),
        ({"filters": 7}, "filters = 7 is not in one of 16, 32"),
        ({"filters": True}, "filters = true is not in"),
        ({"filters": 16, "units": 3}, "units do not exist"),
    ],
)
def test_parameters_of_another_study_are_refused(recorded, message):
    space = SearchSpace.of({"blocks": 1, "filters": Choices(choices=(16, 32))})
    recorded = {f"block1.{k}" if k == "filters" else k: v for k, v in recorded.items()}
    with pytest.raises(StudyError, match=message.replace("filters", r"block1\.filters")):
        space.resolve(recorded)


def test_a_space_can_be_copied_and_sent_to_another_process():
    assert pickle.loads(pickle.dumps(DESIGN)) == DESIGN == copy.deepcopy(DESIGN)


def test_spaces_that_mean_the_same_are_equal():
    kernels = Integers(low=3, high=5)
    assert SearchSpace.of({"conv_l1": 0}) == SearchSpace.of({})
    assert SearchSpace.of({"dense_l1": Choices(choices=(0, 1))}) == SearchSpace.of(
        {"dense_l1": Choices(choices=(0.0, 1.0))}
    )
    assert SearchSpace.of({"kernel_size": kernels, "block1.kernel_size": kernels}) == (
        SearchSpace.of({"kernel_size": kernels})
    )
    rates = Floats(low=0.0, high=0.5)
    shared = SearchSpace.of({"conv_dropout": rates})
    assert SearchSpace.of({"conv_dropout": rates, "block1.conv_dropout": rates}) != shared


# Dimensions.


@pytest.mark.parametrize(
    ("dimension", "middle"),
    [
        (Integers(low=3, high=11, step=2), 7),
        (Integers(low=1, high=2), 1),
        (Integers(low=1, high=100, log=True), 10),
        (Integers(low=3, high=3), 3),
        (Floats(low=0.0, high=0.3), 0.15),
        (Floats(low=0.1, high=0.5, step=0.1), 0.3),
        (Floats(low=0.0, high=0.3, step=0.1), 0.1),
        (Floats(low=1e-6, high=1e-2, log=True), pytest.approx(1e-4)),
        (Choices(choices=(8, 16, 32, 64)), 16),
        (Choices(choices=(1, 2, 3, 4, 5, 6, 7)), 4),
        (Choices(choices=("a",)), "a"),
    ],
)
def test_the_middle_of_a_range(dimension, middle):
    assert dimension.middle == middle
    assert dimension.contains(dimension.middle)


@same_every_time
@given(low=st.integers(1, 1000), more=st.integers(0, 1000))
def test_the_middle_of_a_logarithmic_range_lies_in_it(low, more):
    for dimension in (
        Integers(low=low, high=low + more, log=True),
        Floats(low=low / 7, high=(low + more) / 7, log=True),
    ):
        assert dimension.contains(dimension.middle)


def test_a_range_holds_no_value_off_its_grid_or_of_another_type():
    assert not Integers(low=3, high=11, step=2).contains(4)
    assert not Integers(low=0, high=1).contains(True)
    assert not Integers(low=0, high=1).contains(1.0)
    assert not Floats(low=0.0, high=1.0, step=0.25).contains(0.3)
    assert Floats(low=0.0, high=1.0, step=0.1).contains(0.30000000000000004)
    assert not Floats(low=0.0, high=1.0).contains(math.nan)
    assert not Floats(low=0.0, high=1.0).contains("0.5")
    assert not Choices(choices=(0, 1)).contains(True)


def test_values_are_shown_as_toml():
    shown = toml_value({"a": [True, 'x"\\', 1e-3], "b": {"c": False}})
    assert shown == '{ a = [true, "x\\"\\\\", 0.001], b = { c = false } }'


# From a configuration back to a space.


@same_every_time
@given(config=configurations())
def test_a_configuration_exports_as_a_space_that_resolves_to_it(config):
    flat: dict[str, Any] = {}
    for key, value in space_of(config).items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    space = SearchSpace.of(flat)
    assert space.resolve({}) == config
    assert space.to_document() == space_of(config)


def test_defaults_are_allowed_values_and_belong_to_the_fields_of_a_configuration():
    assert all(key.allows(key.default) for key in KEYS.values())
    config = SearchSpace.of({}).resolve({})
    assert set(BLOCK_KEYS) == set(type(config.blocks[0]).__slots__)
    assert set(DENSE_KEYS) == set(type(config.dense[0]).__slots__)


# Lengths.


def test_lengths_of_the_chapters_network():
    # 200 -> 196 -> 49 -> 47 -> 23 -> 21 -> 10
    assert positions_after_blocks(CHAPTER, 200) == (49, 23, 10)
    assert padded_length(CHAPTER, 200) == 200


def test_parallel_blocks_all_start_from_the_embedding():
    parallel = replace(CHAPTER, arrangement="parallel")
    assert positions_after_blocks(parallel, 200) == (49, 99, 99)


@same_every_time
@given(config=configurations(), max_length=st.integers(1, 60))
def test_no_residue_is_dropped_from_a_padded_network_and_no_position_is_wasted(config, max_length):
    config = replace(config, masking=True, head="global_max")
    padded = padded_length(config, max_length)
    assert padded >= max_length
    # A block's output position is real where the first of its window is.
    real, expected = max_length, []
    for block in config.blocks:
        start = max_length if config.arrangement == "parallel" else real
        real = math.ceil(start / block.pool_size)
        expected.append(real)

    def suffices(length: int) -> bool:
        left = positions_after_blocks(config, length)
        if config.arrangement == "parallel":
            return all(a >= b for a, b in zip(left, expected, strict=True))
        return left[-1] >= expected[-1]

    assert suffices(padded)
    assert not suffices(padded - 1)


@same_every_time
@given(config=configurations(), max_length=st.integers(1, 60))
def test_flatten_and_unmasked_networks_have_the_datas_length(config, max_length):
    assert padded_length(replace(config, head="flatten"), max_length) == max_length
    assert padded_length(replace(config, masking=False), max_length) == max_length


@same_every_time
@given(config=configurations(), max_length=st.integers(1, 80))
def test_a_network_without_misfits_has_positions_everywhere(config, max_length):
    if not misfits(config, max_length):
        left = positions_after_blocks(config, padded_length(config, max_length))
        assert all(positions >= 1 for positions in left)


def test_a_kernel_longer_than_what_pooling_leaves_is_a_misfit_with_either_padding():
    # 200 // 50 = 4 positions for the kernel of 5 in block 2
    for padding in ("same", "valid"):
        space = SearchSpace.of(
            {"padding": padding, "kernel_size": 5, "block1.kernel_size": 1, "pool_size": 1}
            | {"block1.pool_size": 50}
        )
        (misfit,) = misfits(space.resolve({}), 200)
        assert (misfit.block, misfit.key, misfit.size, misfit.positions) == (2, "kernel_size", 5, 4)
        assert not misfits(space.resolve({}), 250)


def test_pooling_that_leaves_no_position_is_a_misfit():
    space = SearchSpace.of({"blocks": 1, "kernel_size": 3, "pool_size": 4, "masking": False})
    config = space.resolve({})
    assert not misfits(config, 4)
    (misfit,) = misfits(config, 3)
    assert (misfit.key, misfit.positions) == ("pool_size", 3)
    valid = replace(config, blocks=(replace(config.blocks[0], padding="valid"),))
    assert misfits(valid, 5)[0].positions == 3
    assert not misfits(valid, 6)


def test_every_parallel_misfit_is_found():
    config = SearchSpace.of({"arrangement": "parallel", "blocks": 3, "kernel_size": 9}).resolve({})
    assert [misfit.block for misfit in misfits(config, 8)] == [1, 2, 3]


@few
@given(space=small_spaces(), max_length=st.integers(2, 16))
def test_the_tightest_configuration_does_not_fit_iff_some_configuration_does_not(space, max_length):
    any_misfit = any(misfits(config, max_length) for config in distinct(space))
    assert bool(misfits(tightest(space), max_length)) == any_misfit


def distinct(space: SearchSpace) -> list[ModelConfig]:
    """Every configuration, but for a lot of kernels where there are too many."""
    narrow = dict(space.entries)
    narrow |= {"filters": 2, "embedding_dim": 1, "units": 1, "normalization": "none"}
    narrow |= {"residual": "none", "dense_layers": 0, "kernel_size": ends(narrow["kernel_size"])}
    return every_configuration(SearchSpace.of(narrow))


def ends(dimension: Any) -> Dimension:
    return Choices(choices=tuple(dict.fromkeys((dimension.low, dimension.high))))


# Parameter counts.


def test_the_chapters_network_has_60929_parameters():
    assert parameter_count(CHAPTER, 200) == 60_929  # the chapter's model.summary()


def test_normalisation_and_projection_count():
    base = SearchSpace.of({"blocks": 1, "filters": 32, "dense_layers": 0}).resolve({})
    count = parameter_count(base, 200)
    # embedding 21 x 16, convolution 5 x 16 x 32 + 32, output 32 + 1
    assert count == 336 + 2592 + 33
    for change, more in (
        ({"normalization": "batch"}, 4 * 32),
        ({"normalization": "layer"}, 2 * 32),
        ({"residual": "projected"}, 16 * 32),
        ({"residual": "identity"}, 0),
    ):
        block = replace(base.blocks[0], **change)
        assert parameter_count(replace(base, blocks=(block,)), 200) == count + more
    assert parameter_count(replace(base, head="global_both"), 200) == count + 32


def test_parallel_branches_are_concatenated():
    base = SearchSpace.of(
        {"arrangement": "parallel", "filters": 8, "dense_layers": 0, "block2.filters": 4}
    ).resolve({})
    convolutions = (5 * 16 + 1) * (8 + 4)
    assert parameter_count(base, 200) == 336 + convolutions + (8 + 4) + 1
    flat = replace(base, head="flatten")
    assert parameter_count(flat, 200) == 336 + convolutions + 100 * (8 + 4) + 1


@settings(same_every_time, max_examples=10)
@given(space=small_spaces(), max_length=st.integers(40, 90))
def test_sampled_parameter_counts_are_those_of_configurations_of_the_space(space, max_length):
    narrow = SearchSpace.of({**dict(space.entries), "kernel_size": 3})
    counts = [parameter_count(config, max_length) for config in every_configuration(narrow)]
    sampled = parameter_counts(narrow, max_length)
    assert {sampled["min"], sampled["median"], sampled["max"]} <= set(counts)
    assert sampled["min"] <= sampled["median"] <= sampled["max"]
    assert sampled == parameter_counts(narrow, max_length)


def test_the_sampled_parameter_counts_of_a_small_space_are_all_there_are():
    space = SearchSpace.of(
        {
            "embedding_dim": 1,
            "blocks": 1,
            "dense_layers": 0,
            "filters": Integers(low=4, high=16, log=True),
            "kernel_size": Integers(low=3, high=11, step=4),
            "learning_rate": Floats(low=1e-4, high=1e-2, log=True),
        }
    )
    # embedding; kernel and bias of each filter; output
    smallest, largest = (21 + (k + 1) * f + f + 1 for k, f in ((3, 4), (11, 16)))
    found = parameter_counts(space, 200)
    assert (found["min"], found["max"], found["sampled"]) == (smallest, largest, 1000)
    # the geometric mean of the filters, the middle kernel
    assert abs(found["median"] - (21 + 9 * 8 + 1)) < 20


def test_a_space_without_a_searched_value_has_one_parameter_count():
    found = parameter_counts(SearchSpace.of({"embedding_dim": 1, "dense_layers": 0}), 200)
    count = 21 + (5 + 1) * 32 + (5 * 32 + 1) * 32 + 33
    assert found == {"min": count, "median": count, "max": count, "sampled": 1}


def test_a_space_of_sixteen_wide_kernels_is_counted_without_trying_them():
    entries = {"masking": False, "padding": "valid", "pool_size": 1, "head": "flatten"}
    wide = {"blocks": Integers(low=1, high=16), "kernel_size": Integers(low=1, high=6250)}
    found = parameter_counts(SearchSpace.of(entries | wide), 100_000)
    assert found["min"] < found["median"] < found["max"]


def test_all_combinations_are_listed_by_the_helper_of_these_tests():
    space = SearchSpace.of({"blocks": Integers(low=1, high=2), "filters": Choices(choices=(1, 2))})
    found = [tuple(block.filters for block in c.blocks) for c in every_configuration(space)]
    expected = [*itertools.product((1, 2), repeat=1), *itertools.product((1, 2), repeat=2)]
    assert sorted(found) == sorted(expected)


def test_every_way_to_declare_a_hyperparameter_takes_the_format_that_has_it_first() -> None:
    declared = [
        whole("n", 1, since=7),
        rate("r", since=7),
        penalty("p", since=7),
        choice("c", True, since=7),
    ]
    assert [one.since for one in declared] == [7] * 4
