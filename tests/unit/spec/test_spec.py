"""Study files: what they mean, and what their author is told when they are wrong."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli_w
from folders import STUDIES
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tuner.errors import Problem, SpecError
from tuner.spec.architecture import parameter_count
from tuner.spec.reader import load_spec, spec_from_document
from tuner.spec.schedule import bracket_turns, brackets, rungs
from tuner.spec.schema import json_schema
from tuner.spec.space import SearchSpace, space_of
from tuner.spec.spec import DataSettings, FastaPair, StudySpec, name_problem
from tuner.spec.toml_lines import key_lines

SHIPPED = sorted(STUDIES.glob("*.toml"))

same_every_time = settings(deadline=None, derandomize=True)

SMALL = """\
name = "small"
trials = 4
[data]
source = "synthetic"
"""


@pytest.fixture
def load(tmp_path):
    """Loads a study file from its text."""

    def load(text: str, *overrides: str) -> StudySpec:
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        return load_spec(path, overrides)

    return load


@pytest.fixture
def problems(load):
    """The problems of a study file, from its text."""

    def problems(text: str, *overrides: str) -> tuple[Problem, ...]:
        with pytest.raises(SpecError) as caught:
            load(text, *overrides)
        return caught.value.problems

    return problems


# The shipped files.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_valid_and_named_like_its_file(path):
    assert load_spec(path).name == path.stem


def test_the_five_files_of_the_design_are_shipped():
    stems = [path.stem for path in SHIPPED]
    assert stems == [
        *("chapter-baseline", "chapter-dropout", "chapter-l2", "quickstart", "solubility")
    ]


@pytest.mark.parametrize("name", ["baseline", "dropout", "l2"])
def test_the_chapters_networks_are_exact_points(name):
    spec = load_spec(STUDIES / f"chapter-{name}.toml")
    assert not spec.space.parameters
    assert (spec.trials, spec.training.max_epochs, spec.rungs) == (3, 10, ())
    assert spec.training.patience == 10
    assert spec.data.split.seed == 1
    config = spec.space.resolve({})
    assert parameter_count(config, 200) == 60_929
    assert [(b.filters, b.kernel_size, b.pool_size) for b in config.blocks] == [
        (16, 5, 4),
        (16, 3, 2),
        (16, 3, 2),
    ]
    assert {(b.padding, b.activation) for b in config.blocks} == {("valid", "relu")}
    assert (config.head, config.masking, config.embedding_dim) == ("flatten", False, 16)
    assert [d.units for d in config.dense] == [256, 64]
    assert (config.optimizer, config.learning_rate, config.batch_size) == ("adam", 1e-3, 16)
    rate = 0.3 if name == "dropout" else 0.0
    assert [d.dense_dropout for d in config.dense] == [rate, rate]
    assert config.output_dropout == rate
    assert [d.dense_l2 for d in config.dense] == ([0.01, 0.01] if name == "l2" else [0.0, 0.0])
    assert not any(b.conv_l2 or b.conv_l1 or b.conv_dropout for b in config.blocks)


def test_the_quickstart_is_small_and_never_touches_the_real_split():
    spec = load_spec(STUDIES / "quickstart.toml")
    assert (spec.data.split.seed, spec.data.fallback) == (1, "synthetic")
    assert 12 <= spec.trials <= 20
    assert spec.training.max_epochs == 9


def test_the_full_search_is_that_of_the_design():
    spec = load_spec(STUDIES / "solubility.toml")
    assert (spec.trials, spec.data.split.seed, spec.data.fallback) == (200, 0, None)
    assert len(spec.space.parameters) == 22
    assert spec.rungs == (1, 3, 9)
    (known,) = spec.known
    assert known["learning_rate"] == 1e-3
    assert known["block2.kernel_size"] == 7
    assert spec.space.resolve(known).learning_rate == 1e-3


# What a file means.


def test_defaults_are_those_of_the_design(load):
    spec = load(SMALL)
    assert spec.seed == 0
    assert spec.data.max_length == 200
    assert (spec.data.split.seed, spec.data.split.validation, spec.data.split.test) == (0, 0.1, 0.1)
    assert (spec.training.max_epochs, spec.training.patience) == (27, 8)
    assert (spec.training.precision, spec.training.max_trial_seconds) == ("auto", 3600)
    assert (spec.hyperband, spec.sampler.kind, spec.known) == (None, "tpe", ())
    assert spec.stop is None
    assert load(SMALL + "[hyperband]").brackets == ((1, 3, 9), (3, 9), (9,), ())


def test_the_folder_of_the_file_is_where_data_paths_start(load, tmp_path):
    assert load(SMALL).folder == tmp_path


def test_patience_none_trains_every_epoch(load):
    spec = load(SMALL + '[training]\npatience = "none"')
    assert spec.training.patience is None
    assert spec_from_document(spec.to_document()).training.patience is None


def test_a_spec_cannot_be_changed(load):
    spec = load(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        spec.trials = 5
    with pytest.raises(ValidationError, match="frozen"):
        spec.data.split.seed = 5


def test_two_fasta_files_are_a_source(load):
    text = SMALL.replace('"synthetic"', '{ soluble = "a.fasta", insoluble = "b.fasta" }')
    assert load(text).data.source == FastaPair(soluble="a.fasta", insoluble="b.fasta")


def test_settings_can_be_made_without_a_file():
    assert DataSettings(source="data.CSV").source == "data.CSV"
    pair = FastaPair(soluble="a.fa", insoluble="b.fa")
    assert DataSettings(source=pair).source == pair


def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_spec(path).name == "small"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_document_is_complete_and_comes_back_as_the_same_spec(path, tmp_path):
    spec = load_spec(path)
    document = spec.to_document()
    assert document == json.loads(json.dumps(document))
    again = spec_from_document(document, folder=spec.folder)
    assert again == spec
    assert again.spec_hash == spec.spec_hash
    written = tmp_path / "written.toml"
    written.write_text(tomli_w.dumps(document), encoding="utf-8")
    assert load_spec(written).to_document() == document


def test_an_exported_configuration_is_a_study_that_trains_it(load):
    spec = load_spec(STUDIES / "solubility.toml")
    config = spec.space.resolve(spec.known[0])
    document = spec.to_document() | {"space": space_of(config), "known": []}
    document["training"]["as_trial"] = 7
    exported = spec_from_document(document)
    assert exported.space.resolve({}) == config
    assert exported.training.as_trial == 7


def test_a_wrong_document_is_refused_with_all_problems():
    with pytest.raises(SpecError) as caught:
        spec_from_document({"name": "x", "trials": 0, "space": {"blocks": 0}})
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["trials", "data", "space.blocks"]


# The hash.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("", '# a comment\n[sampler]\nkind = "tpe"\n[training]\npatience = 8'),
        ("", "[space]\nmasking = true\nconv_l1 = 0\nlearning_rate = 0.001"),
        ("[space]\nblocks = 2\nunits = 3", "[space]\nunits = 3\nblocks = 2"),
        (
            "[space]\nkernel_size = { low = 3, high = 5 }",
            "[space]\nkernel_size = { high = 5, low = 3, step = 1, log = false }",
        ),
        (
            "[space]\nkernel_size = { low = 3, high = 5 }\n[space.block1]",
            """
            [space]
            kernel_size = { low = 3, high = 5 }
            block1 = { kernel_size = { low = 3, high = 5 }, padding = 'same' }
            """,
        ),
        (
            "[space]\nkernel_size = { low = 3, high = 5 }\n[[known]]\nkernel_size = 3",
            """
            [space]
            kernel_size = { low = 3, high = 5 }
            [[known]]
            block1 = { kernel_size = 3 }
            'block2.kernel_size' = 3
            """,
        ),
        (
            "[space]\nunits = { low = 1, high = 8, log = true }",
            "[space]\nunits = { low = 1, high = 8, log = true, step = 1 }",
        ),
        ("[training]\nmax_trial_seconds = 60", "[training]\nmax_trial_seconds = 60.0"),
    ],
)
def test_files_that_mean_the_same_have_the_same_hash(load, one, other):
    assert load(SMALL + one).spec_hash == load(SMALL + other).spec_hash


@pytest.mark.parametrize(
    "override",
    [
        "trials=5",
        "name=another",
        'data.fallback="synthetic"',
        "stop={}",
        "stop.patience=5",
        "notify={}",
    ],
)
def test_the_hash_leaves_out_the_name_and_what_may_change_later(load, override):
    assert load(SMALL, override).spec_hash == load(SMALL).spec_hash


@pytest.mark.parametrize("key", ["url", "url_env"])
def test_the_url_of_a_webhook_is_not_repeated(load, key):
    with pytest.raises(SpecError) as refused:
        load(SMALL + f"[notify]\n{key} = 'https://hooks.example.org/secret'")
    assert "secret" not in str(refused.value) + str(refused.value.to_document())


def test_the_hash_leaves_out_in_which_folder_the_data_lies(load):
    hashes = {load(SMALL, f"data.source={p}").spec_hash for p in ("x.npz", "/d/x.npz", "../x.npz")}
    assert len(hashes) == 1
    assert load(SMALL, "data.source=y.npz").spec_hash not in hashes


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "data.source=solubility",
        "data.max_length=100",
        "data.truncate=true",
        "data.split.seed=1",
        "training.max_epochs=9",
        "training.precision=float32",
        "training.as_trial=0",
        "hyperband={}",
        "sampler.kind=random",
        "space.units=65",
        "space.block1.filters=3",
        "known=[{}]",
    ],
)
def test_the_hash_changes_with_what_the_study_does(load, override):
    assert load(SMALL, override).spec_hash != load(SMALL).spec_hash


def test_the_hash_is_the_same_on_every_machine(load, monkeypatch):
    # It is written into reports and exports. A version that adds a key, or another default, has
    # another hash, and no study is another one for that: see tests/unit/search/test_formats.py.
    document = {"b": True, "a": [1.5, "é"]}
    monkeypatch.setattr(StudySpec, "identity_document", lambda _: document)
    assert load(SMALL).spec_hash[:16] == "037e5c690a2eb11f"


def test_a_file_says_which_of_its_keys_are_left_out(load):
    spec = load(SMALL + "[training]\nmax_epochs = 27\n[space]\nunits = 3")
    left_out = ("seed", "hyperband", "training.patience", "data.split.seed", "hyperband.eta")
    assert [spec.leaves_out(key) for key in left_out] == [True] * 5
    written = ("trials", "training", "training.max_epochs", "data.source", "space.units")
    assert [spec.leaves_out(key) for key in written] == [False] * 5
    assert not load(SMALL, "training.patience=8").leaves_out("training.patience")


# Hyperband.


def test_rungs_fall_after_1_3_and_9_epochs():
    assert rungs(1, 27, 3) == (1, 3, 9)  # arXiv:1603.06560, R = 27, eta = 3


def test_brackets_are_those_of_the_paper():
    # arXiv:1603.06560, table 1: r_i for R = 81, eta = 3, bracket s = 4, 3, 2, 1, 0. Its last
    # r_i is R: there a trial is complete and nothing is decided.
    table = ((1, 3, 9, 27, 81), (3, 9, 27, 81), (9, 27, 81), (27, 81), (81,))
    assert brackets(1, 81, 3) == tuple(column[:-1] for column in table)


def test_a_round_has_as_many_trials_a_bracket_as_the_paper_with_a_budget_of_r():
    # arXiv:1603.06560, algorithm 1: n of bracket s = 4, 3, 2, 1, 0 for B = R = 81, eta = 3, so
    # that the eta^-s of them that are left have at most R epochs on each of s + 1 rungs.
    assert bracket_turns(1, 81, 3) == (0,) * 17 + (1,) * 7 + (2,) * 3 + (3,) * 2 + (4,)


@pytest.mark.parametrize(
    ("min_epochs", "max_epochs", "eta", "count"),
    [
        (1, 243, 3, 6),  # math.log(243, 3) is 4.999...
        (1, 1000, 10, 4),
        (2, 486, 3, 6),
        (1, 1, 3, 1),
        (5, 9, 2, 1),
        (1, 242, 3, 5),
        (1, 100_000, 2, 17),
    ],
)
def test_brackets_are_counted_in_whole_numbers(min_epochs, max_epochs, eta, count):
    assert len(brackets(min_epochs, max_epochs, eta)) == count


@pytest.mark.parametrize(
    ("min_epochs", "max_epochs", "eta", "found"),
    [
        (1, 100, 4, (2, 6, 25)),  # 1.5625, 6.25, 25
        (1, 50, 3, (2, 6, 17)),  # 1.85, 5.56, 16.67
        (2, 27, 3, (3, 9)),
        (1, 243, 3, (1, 3, 9, 27, 81)),
        (1, 1000, 3, (1, 4, 12, 37, 111, 333)),
        (10, 1000, 3, (12, 37, 111, 333)),
        (1, 10, 4, (3,)),  # 2.5
        (1, 3, 2, (2,)),  # 1.5
        (3, 8, 3, ()),
        (1, 2, 3, ()),
        (27, 27, 3, ()),
        # where R is a power of eta, the powers of eta
        (1, 9, 3, (1, 3)),
        (1, 16, 2, (1, 2, 4, 8)),
        (1, 3, 3, (1,)),
    ],
)
def test_rungs_are_counted_down_from_all_epochs(min_epochs, max_epochs, eta, found):
    assert rungs(min_epochs, max_epochs, eta) == found  # r_i = R eta^-s eta^i


@same_every_time
@given(st.integers(1, 50), st.integers(0, 5000), st.integers(2, 9))
def test_brackets_follow_the_definition(min_epochs, more, eta):
    max_epochs = min_epochs + more
    found = brackets(min_epochs, max_epochs, eta)
    s_max = len(found) - 1
    assert min_epochs * eta**s_max <= max_epochs < min_epochs * eta ** (s_max + 1)
    for s, of_bracket in zip(range(s_max, -1, -1), found, strict=True):
        r = Fraction(max_epochs, eta**s)
        assert [abs(rung - r * eta**i) <= Fraction(1, 2) for i, rung in enumerate(of_bracket)] == [
            True
        ] * s
        assert [*of_bracket, max_epochs] == sorted({*of_bracket, max_epochs})
        assert all(rung >= min_epochs for rung in of_bracket)
    assert found[-1] == ()  # never stops


def test_a_study_knows_its_brackets(load):
    spec = load(SMALL + "[training]\nmax_epochs = 30\n[hyperband]\nmin_epochs = 2\neta = 4")
    assert spec.rungs == (8,)  # 30 / 4, halves up
    assert spec.brackets == ((8,), ())
    assert spec.bracket_count == 2
    assert [spec.bracket_of(trial) for trial in range(7)] == [0, 0, 1, 0, 0, 1, 0]
    assert spec.trials_of_brackets(9) == (6, 3)
    without = load(SMALL)
    assert without.bracket_count == 0
    assert without.bracket_of(0) is None
    assert without.trials_of_brackets(9) == ()


# Known configurations.

SPACE = """
[space]
blocks = { low = 1, high = 3 }
kernel_size = { low = 3, high = 11, step = 2 }
pool_size = { low = 2, high = 4 }
conv_dropout = { low = 0, high = 0.3 }
dense_layers = { low = 0, high = 2 }
units = { choices = [32, 64, 128, 256] }
learning_rate = { low = 1e-4, high = 1e-2, log = true }
masking = { choices = [true, false] }
[space.block1]
pool_size = 4
"""


def test_what_a_known_configuration_does_not_name_takes_the_middle(load):
    (known,) = load(SMALL + SPACE + "[[known]]\n").known
    assert known == {
        "masking": True,
        "blocks": 2,
        "block1.kernel_size": 7,
        "conv_dropout": 0.15,
        "block2.kernel_size": 7,
        "block2.pool_size": 3,
        "dense_layers": 1,
        "dense1.units": 64,
        "learning_rate": pytest.approx(1e-3),
    }


def test_a_known_configuration_names_blocks_together_or_each(load):
    text = "[[known]]\nblocks = 3\nkernel_size = 5\nblock2.kernel_size = 9\npool_size = 2\n"
    (known,) = load(SMALL + SPACE + text).known
    assert [known[f"block{n}.kernel_size"] for n in (1, 2, 3)] == [5, 9, 5]
    # The first block's is fixed at 4, so the shared name speaks for the others.
    assert (known["block2.pool_size"], known["block3.pool_size"]) == (2, 2)


def test_a_known_configuration_may_repeat_what_is_fixed(load):
    text = '[[known]]\npadding = "same"\nblock1.pool_size = 4\nconv_l1 = 0\n'
    assert len(load(SMALL + SPACE + text).known) == 1


def test_a_whole_number_is_good_for_a_rate(load):
    (known,) = load(SMALL + SPACE + "[[known]]\nconv_dropout = 0\n").known
    assert isinstance(known["conv_dropout"], float)


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ("learning_rat = 1e-3", "learning_rat", 'did you mean "learning_rate"?'),
        ("learning_rate = 1", "learning_rate", "1 is not in the space: it is searched in 0.0001"),
        ("kernel_size = 4", "kernel_size", "4 is not in the space: block1.kernel_size"),
        ("units = 100", "units", "is searched in one of 32, 64, 128, 256"),
        ("dense1 = { units = 100 }", "dense1.units", "one of 32, 64, 128, 256"),
        ("masking = 1", "masking", "must be true or false, not 1"),
        ("learning_rate = '1e-3'", "learning_rate", "without the quotes"),
        ("padding = 'valid'", "padding", 'fixed at "same" in [space], not "valid"'),
        ("padding = 'vaild'", "padding", 'did you mean "valid"?'),
        ("block1.pool_size = 3", "block1.pool_size", "fixed at 4"),
        ("blocks = 1\npool_size = 3", "pool_size", "block1.pool_size is fixed at 4"),
        ("blocks = 2\nblock3.kernel_size = 5", "block3.kernel_size", "name blocks = 3, or remove"),
        ("block4.kernel_size = 5", "block4.kernel_size", "blocks = 2"),
        ("dense2.units = 32", "dense2.units", "name dense_layers = 2, or remove"),
        ("dense_layers = 0\nunits = 32", "units", "no hidden dense layer"),
        ("blocks = 9\nblock3 = { kernel_size = 5 }", "blocks", "searched in 1 .. 3"),
        ("block1.conv_dropout = 0.1", "block1.conv_dropout", "name conv_dropout, or give"),
        ("block1.units = 32", "block1.units", "unknown hyperparameter"),
        ("blocks = [1]", "blocks", "bare values"),
        ("blocks = { low = 1, high = 2 }", "blocks", "bare values"),
        ("learning_rate = nan", "learning_rate", "must be a number above 0"),
    ],
)
def test_a_known_configuration_must_lie_in_the_space(problems, table, key, message):
    (problem,) = problems(SMALL + SPACE + "[[known]]\nblocks = 2\n[[known]]\n" + table)
    assert problem.key == f"known.1.{key}"
    assert message in problem.message
    first_line = (SMALL + SPACE).count("\n") + 4
    assert first_line <= problem.line <= first_line + table.count("\n")


def test_the_same_configuration_twice_is_a_problem(problems):
    (problem,) = problems(SMALL + SPACE + "[[known]]\n[[known]]\nblocks = 2\n")
    assert "is the same as 1; remove one" in problem.message


@pytest.mark.parametrize(
    ("override", "key"), [("known=3", "known"), ("known=[3]", "known.0"), ("known={}", "known")]
)
def test_known_must_be_a_list_of_tables(problems, override, key):
    (problem,) = problems(SMALL, override)
    assert problem.key == f"--set {key}"


# Mistakes. Each line: what is added to SMALL; the key, the line after SMALL, part of the message.

MISTAKES = [
    # unknown keys
    ("[sampler]\nknd = 'tpe'", "sampler.knd", 2, 'did you mean "kind"?'),
    ("[hyperbnd]", "hyperbnd", 1, 'did you mean "hyperband"?'),
    ("[space]\nkernal_size = 3", "space.kernal_size", 2, 'did you mean "kernel_size"?'),
    ("[space]\nzzz = 3", "space.zzz", 2, "known are embedding_dim, "),
    ("[space]\ntrials = 3", "space.trials", 2, "belongs at the top of the file"),
    ("[space]\nmax_epochs = 3", "space.max_epochs", 2, "belongs in [training]"),
    ("[training]\nlearning_rate = 3", "training.learning_rate", 2, "belongs in [space]"),
    ("[space]\n[space.blok1]\nfilters=3", "space.blok1", 2, 'did you mean "block1"?'),
    ("[space.block0]\nfilters = 3", "space.block0", 1, "counted from 1"),
    ("[space.block1]\nfilter = 3", "space.block1.filter", 2, 'did you mean "filters"?'),
    ("[space.block1]\nunits = 3", "space.block1.units", 2, "belongs to dense layers"),
    ("[space.dense1]\npadding = 'same'", "space.dense1.padding", 2, "belongs to blocks"),
    ("[space.block1]\nhead = 'flatten'", "space.block1.head", 2, "one for the whole network"),
    ("[space.output]\nzzz = 1", "space.output.zzz", 2, "known are dense_dropout"),
    ("[space]\nblocks = { low = 1, hihg = 3, high = 4 }", "space.blocks.hihg", 2, '"high"?'),
    # types and bounds of settings
    ("[training]\nmax_epochs = 2.0", "training.max_epochs", 2, "whole number, not 2.0"),
    ("[training]\nmax_epochs = true", "training.max_epochs", 2, "whole number, not true"),
    ("[training]\nmax_epochs = '9'", "training.max_epochs", 2, "without the quotes"),
    ("[training]\nmax_epochs = 0", "training.max_epochs", 2, "at least 1, not 0"),
    ("[training]\npatience = 0", "training.patience", 2, "at least 1"),
    ("[training]\npatience = 'x'", "training.patience", 2, 'number or "none", not "x"'),
    ("[training]\nprecision = 'fp32'", "training.precision", 2, '"auto", "float32", "bfloat16"'),
    ("[training]\nmax_trial_seconds = inf", "training.max_trial_seconds", 2, "finite"),
    ("[training]\nmax_trial_seconds = nan", "training.max_trial_seconds", 2, "finite"),
    ("[training]\nmax_trial_seconds = 0", "training.max_trial_seconds", 2, "above 0"),
    ("[training]\nas_trial = -1", "training.as_trial", 2, "at least 0"),
    ("[sampler]\nkind = 'TPE'", "sampler.kind", 2, 'did you mean "tpe"?'),
    ("[sampler]\nkind = 2026-01-01", "sampler.kind", 2, 'one of "tpe", "random"'),
    ("training = 3", "data.training", 1, "belongs at the top"),
    # brackets
    ("[hyperband]\neta = 1", "hyperband.eta", 2, "at least 2"),
    ("[hyperband]\nmin_epochs = 0", "hyperband.min_epochs", 2, "at least 1"),
    ("[hyperband]\nmin_epochs = 28", "hyperband.min_epochs", 2, "training.max_epochs = 27"),
    # stop
    ("[stop]\npatience = 0", "stop.patience", 2, "at least 1"),
    ("[stop]\npatience = 'none'", "stop.patience", 2, "whole number"),
    ("[stop]\nmin_delta = -0.1", "stop.min_delta", 2, "at least 0"),
    ("[stop]\nmin_epochs = 3", "stop.min_epochs", 2, "belongs in [hyperband]"),
    # notify
    ("[notify]\non = ['finishd']", "notify.on.0", 2, 'did you mean "finished"?'),
    ("[notify]\non = []", "notify.on", 2, "must name an event"),
    ("[notify]\non = 'failed'", "notify.on", 2, "must be a list"),
    ("[notify]\nurl_env = 'HTTPS_PROXY'", "notify.url_env", 2, "begins with TUNER_NOTIFY"),
    ("[notify]\nurl_env = 'TUNER_NOTIFY/'", "notify.url_env", 2, "begins with TUNER_NOTIFY"),
    ("[notify]\nurl = 'https://x'", "notify.url", 2, "names no URL, which may hold a token"),
    # data
    ("max_length = 0", "data.max_length", 1, "at least 1"),
    ("fallback = 'none'", "data.fallback", 1, 'one of "synthetic"'),
    ("truncate = 'yes'", "data.truncate", 1, 'one of "end", "start", "middle"'),
    ("truncate = 1", "data.truncate", 1, 'one of "end", "start", "middle"'),
    ("unknown = 'masc'", "data.unknown", 1, 'did you mean "mask"?'),
    ("conflicts = 'keep'", "data.conflicts", 1, 'one of "error", "drop"'),
    ("columns.label = ' '", "data.columns.label", 1, "the name of a column"),
    ("columns.labels = 'x'", "data.columns.labels", 1, 'did you mean "label"?'),
    ("columns = 'x'", "data.columns", 1, "a table"),
    (
        "columns = { label = 'Sequence' }",
        "data.columns",
        1,
        'sequence and label are both "Sequence"',
    ),
    ("columns.label = 'x'", "data.columns", 1, "source is another; leave them out"),
    ("[training]\nclass_weights = true", "training.class_weights", 2, 'one of "none", "balanced"'),
    ("split.seed = -1", "data.split.seed", 1, "at least 0"),
    ("split.rule = 'sorted'", "data.split.rule", 1, 'one of "random"'),
    ("split.test = 0", "data.split.test", 1, "above 0"),
    ("split.test = 1.0", "data.split.test", 1, "below 1"),
    ("split = { test = 0.5, validation = 0.5 }", "data.split", 1, "nothing to train on"),
    ("split.test = ['2']", "data.split", 1, 'takes rule = "given" and column = "..."'),
    ("split.column = 'x'", "data.split", 1, 'column is a key of rule = "given"'),
    ("split.rule = 'given'", "data.split", 1, 'has rule = "given" and no column'),
    ("split = { rule = 'given', column = 'x' }", "data.split", 1, "source is no .csv or .tsv file"),
    (
        "split = { rule = 'given', column = 'x', test = 0.1 }",
        "data.split",
        1,
        'with rule = "given" it names values of the column, as in test = ["test"]',
    ),
    (
        "split = { rule = 'given', column = 'x', test = ['a'], validation = ['A'] }",
        "data.split",
        1,
        '"a" is named by validation and by test',
    ),
    ("split.rule = 'homologous'", "data.split.rule", 1, 'did you mean "homology"?'),
    ("split.identity = 0.3", "data.split", 1, 'identity is a key of rule = "homology"'),
    ("split = { rule = 'homology', identity = 30 }", "data.split.identity", 1, "at most 1"),
    ("split.folds = 1", "data.split.folds", 1, "at least 2"),
    ("split.folds = 21", "data.split.folds", 1, "at most 20"),
    ("split.folds = '5'", "data.split.folds", 1, "a whole number"),
    ("split.folds = { column = 'x', of = 3 }", "data.split.folds.of", 1, "known are column"),
    ("split.folds = { column = 'x' }", "data.split", 1, "source is no .csv or .tsv file"),
    ("split = { reshuffle = true, folds = 3 }", "data.split", 1, "leave one of the two out"),
    ("split = { reshuffle = true, rule = 'homology' }", "data.split", 1, "leave reshuffle out"),
    ("split = { rule = 'given', test = [] }", "data.split.test", 1, "a list of values"),
    ("split = { rule = 'given', test = [1.5] }", "data.split.test", 1, "a list of values"),
    # values of the space
    ("[space]\nkernel_size = 0", "space.kernel_size", 2, "at least 1"),
    ("[space]\nkernel_size = 3.0", "space.kernel_size", 2, "whole number"),
    ("[space]\nkernel_size = true", "space.kernel_size", 2, "whole number"),
    ("[space]\nfilters = 100000", "space.filters", 2, "at most 65536"),
    ("[space]\nblocks = 17", "space.blocks", 2, "at most 16"),
    ("[space]\ndense_layers = -1", "space.dense_layers", 2, "at least 0"),
    ("[space]\nconv_dropout = 1.0", "space.conv_dropout", 2, "below 1"),
    ("[space]\nconv_dropout = -0.1", "space.conv_dropout", 2, "at least 0"),
    ("[space]\nconv_l2 = -1e-9", "space.conv_l2", 2, "at least 0"),
    ("[space]\nconv_l2 = inf", "space.conv_l2", 2, "must be a number"),
    ("[space]\nlearning_rate = 0", "space.learning_rate", 2, "above 0"),
    ("[space]\nmasking = 1", "space.masking", 2, "true or false"),
    ("[space]\nactivation = 'swsh'", "space.activation", 2, 'did you mean "swish"?'),
    ("[space]\nfilters = [16, 32]", "space.filters", 2, "write { choices = [16, 32] }"),
    ("[space]\nblock1 = 3", "space.block1", 2, "must be a table"),
    # ranges
    ("[space]\nblocks = { low = 3, high = 1 }", "space.blocks", 2, "low = 3 is above high = 1"),
    ("[space]\nblocks = { low = 1 }", "space.blocks", 2, "needs high"),
    ("[space]\nblocks = {}", "space.blocks", 2, "{ low = ..., high = ... } or { choices"),
    ("[space]\nblocks = { high = 2 }", "space.blocks", 2, "needs low"),
    ("[space]\nblocks = { low = 0, high = 2 }", "space.blocks.low", 2, "at least 1"),
    ("[space]\nhead = { low = 1, high = 2 }", "space.head", 2, "write { choices = ["),
    ("[space]\nmasking = { low = 0, high = 1 }", "space.masking", 2, "choices = [true, false]"),
    ("[space]\nconv_l2 = { low = 0, high = 1, log = true }", "space.conv_l2", 2, "above 0, not 0"),
    (
        "[space]\ndense_layers = { low = 0, high = 1, log = true }",
        "space.dense_layers",
        2,
        "above 0, not 0",
    ),
    ("[space]\nunits = { low = 1, high = 2, log = 1 }", "space.units.log", 2, "true or false"),
    ("[space]\nunits = { low = 1, high = 9, step = 3 }", "space.units", 2, "high = 7 or high = 10"),
    ("[space]\nunits = { low = 1, high = 9, step = 0 }", "space.units.step", 2, "at least 1"),
    ("[space]\nunits = { low = 1, high = 9, step = 0.5 }", "space.units.step", 2, "whole number"),
    ("[space]\nunits = { low=1, high=9, step=2, log=true }", "space.units.step", 2, "no step"),
    (
        "[space]\nconv_dropout = { low = 0, high = 0.5, step = 0.2 }",
        "space.conv_dropout",
        2,
        "high = 0.4 or high = 0.6",
    ),
    (
        "[space]\nconv_dropout = { low = 0, high = 0.5, step = nan }",
        "space.conv_dropout.step",
        2,
        "above 0",
    ),
    (
        "[space]\nconv_dropout = { low = 0, high = 0.5, step = inf }",
        "space.conv_dropout.step",
        2,
        "above 0",
    ),
    (
        "[space]\nconv_l2 = { low = 0.0, high = 1.0, step = 1e-30 }",
        "space.conv_l2",
        2,
        "more than 10,000,000 steps of 1e-30",
    ),
    (
        "[space]\nconv_l2 = { low = 0.0, high = 1.0, step = 5e-324 }",
        "space.conv_l2",
        2,
        "more than 10,000,000 steps of 5e-324",
    ),
    (
        f"[space]\nconv_l2 = {{ low = 0.5, high = 0.5, step = 1{'0' * 400} }}",
        "space.conv_l2.step",
        2,
        "at most 1000000, not 1000",
    ),
    (
        f"[space]\nunits = {{ low = 3, high = 3, step = 1{'0' * 400} }}",
        "space.units.step",
        2,
        "at most 65536, not 1000",
    ),
    (
        "[space]\nconv_l2 = { low = 1e-300, high = 1.0, step = 0.3 }",
        "space.conv_l2",
        2,
        "write high = 0.9 or high = 1.2",
    ),
    # choices
    ("[space]\nunits = { choices = [] }", "space.units.choices", 2, "at least one value"),
    ("[space]\nunits = { choices = 3 }", "space.units.choices", 2, "must be a list"),
    ("[space]\nunits = { choices = [3, 3] }", "space.units.choices.1", 2, "stands twice"),
    ("[space]\nconv_l1 = { choices = [1, 1.0] }", "space.conv_l1.choices.1", 2, "stands twice"),
    ("[space]\nunits = { choices = [3,\n'4'] }", "space.units.choices.1", 2, "whole number"),
    ("[space]\nunits = { choices = [3], low = 1 }", "space.units.low", 2, "choices stand alone"),
    (
        "[space]\nactivation = { choices = [\n'relu',\n'swsh'] }",
        "space.activation.choices.1",
        2,
        'did you mean "swish"?',
    ),
    # layers that cannot be
    ("[space.block5]\nfilters = 3", "space.block5", 1, "blocks can be at most 2"),
    ("[space]\n[space.dense2]", "space.dense2", 2, "dense_layers can be at most 1"),
    ("[space]\nblocks = { choices = [1, 3] }\n[space.block4]", "space.block4", 3, "at most 3"),
]


@pytest.mark.parametrize(("text", "key", "line", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_named_with_its_line_its_value_and_a_remedy(
    problems, text, key, line, message
):
    (problem,) = problems(SMALL + text)
    assert problem.key == key
    assert problem.line == SMALL.count("\n") + line
    assert message in problem.message
    assert problem.file.endswith("study.toml")
    assert str(problem) == f"{problem.file}:{problem.line}: {key}: {problem.message}"


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_lines(problems):
    text = """\
trials = true
sed = 3
[data]
source = "solubilty"
[hyperband]
min_epochs = 99
[space]
kernal_size = 3
units = { low = 2, high = 1 }
dense_dropout = 7
[space.block1]
filters = 0
[[known]]
learning_rat = 3
units = 4
dense_dropout = 8
"""
    found = [(problem.line, problem.key) for problem in problems(text)]
    assert found == [
        (1, "trials"),
        (2, "sed"),
        (4, "data.source"),
        (6, "hyperband.min_epochs"),
        (8, "space.kernal_size"),
        (9, "space.units"),
        (10, "space.dense_dropout"),
        (12, "space.block1.filters"),
        (14, "known.0.learning_rat"),
        (16, "known.0.dense_dropout"),
        (None, "name"),
    ]


def test_what_a_mistaken_count_would_make_wrong_is_not_reported(problems):
    text = "[space]\nblocks = 'three'\n[space.block3]\nfilters = 4\n[[known]]\nblock3.filters = 4"
    assert [problem.key for problem in problems(SMALL + text)] == ["space.blocks"]


@pytest.mark.parametrize(
    ("key", "remedy"),
    [("name", 'name = "my-study"'), ("trials", "trials = 20"), ("data", "[data]")],
)
def test_a_missing_key_is_named_with_an_example(problems, key, remedy):
    document = tomllib.loads(SMALL)
    del document[key]
    (problem,) = problems(tomli_w.dumps(document))
    assert problem.key == key
    assert remedy in problem.message


def test_a_missing_source_is_reported_at_its_table(problems):
    (problem,) = problems('name = "x"\ntrials = 1\n[data]\nmax_length = 100\n')
    assert (problem.line, problem.key) == (3, "data.source")


@pytest.mark.parametrize(
    ("source", "key", "message"),
    [
        ('"solubilty"', "data.source", 'did you mean "solubility"?'),
        ('""', "data.source", "must be a path"),
        ('"a\\u0000.csv"', "data.source", "must be a path"),
        ('"proteins.xlsx"', "data.source", "ends in .npz, .csv, .tsv, .csv.gz or .tsv.gz"),
        ("3", "data.source", "text in quotes"),
        ('{ soluble = "a" }', "data.source.insoluble", "is missing"),
        ('{ soluble = "", insoluble = "b" }', "data.source.soluble", "must be a path"),
        (
            '{ soluble = "a", insolubel = "b", insoluble = "c" }',
            "data.source.insolubel",
            "insoluble",
        ),
    ],
)
def test_a_source_that_cannot_be(problems, source, key, message):
    (problem,) = problems(SMALL.replace('"synthetic"', source))
    assert (problem.line, problem.key) == (4, key)
    assert message in problem.message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a/b", "must not contain /"),
        ("a\\b", "must not contain \\"),
        ("..", "begin with ."),
        (".hidden", "begin with ."),
        ("-rf", "begin with . or -"),
        ("end.", "end with ."),
        ("a\nb", "U+000A"),
        ("a\x00b", "U+0000"),
        ("a\u200bb", "U+200B"),
        (" a", "space"),
        ("a" * 81, "81 characters"),
        ("\N{GRINNING FACE}" * 60, "60 characters of 240 bytes; a name has at most 160"),
        ("a:b", "must not contain :"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(problems, name, message):
    assert message in (name_problem(name) or "")
    (problem,) = problems(tomli_w.dumps(tomllib.loads(SMALL) | {"name": name}))
    assert (problem.line, problem.key) == (1, "name")


@pytest.mark.parametrize(
    "name",
    ["a", "solubility-synthetic", "Löslichkeit 2", "v1.2_b", "a" * 80, "\N{GRINNING FACE}" * 40],
)
def test_usual_names_are_good(name):
    assert name_problem(name) is None


# Lengths.


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_kernel_longer_than_what_pooling_leaves_is_reported_with_its_combination(
    problems, padding
):
    text = f"""\
max_length = 100
[space]
blocks = {{ low = 1, high = 3 }}
kernel_size = {{ low = 3, high = 9, step = 2 }}
pool_size = {{ low = 2, high = 4 }}
padding = "{padding}"
"""
    (problem,) = problems(SMALL + text)
    # "same", padded at the end: 100 -> 25 -> 7
    assert (problem.key, problem.line) == ("space.kernel_size", 8)
    assert "a kernel of 9 positions in block 3 is longer than the 7 positions" in problem.message
    assert "block 2: kernel_size = 9, " in problem.message
    assert f'padding = "{padding}", pool_size = 4' in problem.message
    assert "or pool_size, or raise data.max_length" in problem.message


def test_the_worst_case_counts_a_head_that_is_only_one_choice(problems, load):
    # With a global head and masking 100 -> 25 -> 7; flattened, remainders fall off: 100 -> 25 -> 6
    text = "max_length = 100\n[space]\nblocks = 3\nkernel_size = 7\npool_size = 4\n"
    assert load(SMALL + text.replace("blocks = 3", "blocks = 2"))
    flat = text + 'head = { choices = ["global_max", "flatten"] }\n'
    assert load(SMALL + text)
    (problem,) = problems(SMALL + flat)
    assert "the 6 positions" in problem.message


def test_pooling_that_leaves_no_position_is_reported(problems):
    text = "max_length = 20\n[space]\nblocks = 1\n[space.block1]\npool_size = 21\n"
    (problem,) = problems(SMALL + text)
    assert (problem.key, problem.line) == ("space.block1.pool_size", 9)
    assert "leaves nothing of the 20 positions" in problem.message


def test_an_override_is_blamed_for_the_length_that_it_set(problems):
    (problem,) = problems(SMALL + "[space]\nkernel_size = 9\n", "data.max_length=10")
    assert problem.key == "--set data.max_length"
    assert problem.message.startswith("space.kernel_size: a kernel of 9 positions")


def test_a_kernel_is_not_judged_by_a_length_that_is_mistaken(problems):
    keys = [p.key for p in problems(SMALL + "max_length = 0\n[space]\nkernel_size = 999\n")]
    assert keys == ["data.max_length"]


# --set


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data.split.seed=1", lambda spec: spec.data.split.seed == 1),
        (" trials = 7 ", lambda spec: spec.trials == 7),
        ("training.precision=bfloat16", lambda spec: spec.training.precision == "bfloat16"),
        ('training.precision="float32"', lambda spec: spec.training.precision == "float32"),
        ("name=2026-01-31", lambda spec: spec.name == "2026-01-31"),
        ("data.source=../d/x.csv", lambda spec: spec.data.source == "../d/x.csv"),
        ("data.source=C:\\d\\x.csv", lambda spec: spec.data.source == "C:\\d\\x.csv"),
        ("known=[]", lambda spec: spec.known == ()),
        ("known.0.blocks=2", lambda spec: spec.known[0]["blocks"] == 2),
        ("hyperband.eta=4", lambda spec: spec.rungs == (2, 7)),
        (
            "space.kernel_size={ low = 3, high = 5 }",
            lambda spec: "block3.kernel_size" in spec.space.parameters,
        ),
        (
            "space.blocks.high=2",
            lambda spec: spec.space.parameters["blocks"].high == 2,
        ),
        ("space.block1.filters=3", lambda spec: "block1.filters" not in spec.space.parameters),
    ],
)
def test_set_overrides_any_key(load, override, read):
    text = SMALL + "[hyperband]\n[space]\nblocks = { low = 1, high = 3 }\n"
    text += "filters = { low = 1, high = 3 }\n[[known]]\nblocks = 1\n"
    assert not read(load(text))
    assert read(load(text, override))


def test_later_overrides_win(load):
    assert load(SMALL, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("data.split.sed=1", "--set data.split.sed", 'did you mean "seed"?'),
        ("space.units={ low = 5, high = 3 }", "--set space.units", "low = 5 is above"),
        ("space.units.high=3", "--set space.units.high", "low = 8 is above high = 3"),
        ("space.activation=swsh", "--set space.activation", 'did you mean "swish"?'),
        ("trials=0", "--set trials", "at least 1"),
        ("trials=ten", "--set trials", 'whole number, not "ten"'),
        ("training.max_epochs=nan", "--set training.max_epochs", "whole number"),
        ("data.split.test=0.95", "--set data.split.test", "leave nothing to train on"),
        ("hyperband.min_epochs=99", "--set hyperband.min_epochs", "training.max_epochs = 27"),
        ("trials", "--set trials", "write --set key=value"),
        ("=3", "--set", "write --set key=value"),
        ("trials=", "--set trials", "write --set key=value"),
        ("data..seed=1", "--set data..seed", "is no key"),
        ("a b=1", "--set a b", "is no key"),
        ("trials.x=1", "--set trials.x", "no table; set trials as a whole"),
        ("known.3.x=1", "--set known.3.x", "list of 0"),
        ("known.x=1", "--set known.x", "list of 0"),
        ("space.filters=[1", "--set space.filters", "no TOML value: Unclosed array"),
        ("trials=3\nseed=4", "--set trials", "one key and one value each"),
        ("name=a\nb", "--set name", "no TOML value"),
        ("[data]\nx=1", "--set [data]\nx", "write --set"),
    ],
)
def test_a_bad_override_is_named_as_the_place(problems, override, key, message):
    text = "known = []\n" + SMALL + "[space]\nunits = { low = 8, high = 9 }\n"
    (problem,) = problems(text, override)
    assert (problem.file, problem.line, problem.key) == ("", None, key)
    assert message in problem.message


def test_mistakes_of_file_and_overrides_come_together(problems):
    found = [problem.key for problem in problems(SMALL + "x = 1\n", "seed=-1", "y")]
    assert found == ["--set y", "data.x", "--set seed"]


# Files that cannot be read.


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name = 'x'\ntrials = True\n", 2, '"quotes", true and false in small letters'),
        ("name = small\n", 1, "text stands in"),
        ("name = 'x'\nname = 'y'\n", 2, "stands twice; remove one"),
        ("[data]\n[space]\n[data]\n", 3, "join both"),
        ("x = [1,\n2\n", 2, "a list ends with ]"),
        ("name 'x'\n", 1, "Expected '='"),
        ("name = 'x\n", 1, "quotes that it began with"),
        ("x = 1 y = 2", 1, "one key a line"),
        ("a = " + "[\n" * 3000, None, "nested too deeply"),
        ("a = " + "[" * 200 + "]" * 200, None, "nested too deeply"),
        ("[data]\n" + "a." * 490 + "a = 1", None, "keys of a few parts"),
        ("[data]\n" + "a." * 500 + "a = 1", 2, "is a line of more than 1,000 characters"),
        ("a = 1" + "0" * 5000, 1, "is a line of more than 1,000 characters"),
    ],
)
def test_wrong_syntax_is_reported_with_its_line(problems, text, line, message):
    (problem,) = problems(text)
    assert problem.line == line
    assert message in problem.message


def test_a_long_number_is_reported(problems):
    (problem,) = problems(SMALL.replace("= 4", "= 0x" + "f" * 900))
    assert problem.line == 2
    assert "must be at most 1000000" in problem.message


def test_a_file_that_does_not_exist_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "quickstart.toml").write_text(SMALL)
    for name in ("quikstart.toml", "quickstart"):
        with pytest.raises(SpecError, match=r"no such file; did you mean .*quickstart\.toml"):
            load_spec(tmp_path / name)
    with pytest.raises(SpecError, match="no such file; there are no study files"):
        load_spec(tmp_path / "nowhere" / "x.toml")


def test_a_folder_is_no_study_file(tmp_path):
    with pytest.raises(SpecError, match="is a folder"):
        load_spec(tmp_path)


@pytest.mark.parametrize("name", ["file.toml/x.toml", "a\0b", "x" * 300])
def test_a_path_that_cannot_be_opened_is_reported(tmp_path, name):
    (tmp_path / "file.toml").write_text(SMALL)
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / name)


def test_a_file_without_read_permission_is_reported(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SpecError, match=r"cannot be read \(Permission denied\); check the path"):
        load_spec(tmp_path / "x.toml")


def test_a_file_that_is_not_utf_8_is_reported_with_its_line(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes(b"trials = 3\nname = 'L\xf6slichkeit'\n")
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert caught.value.problems[0].line == 2
    path.write_bytes(SMALL.encode("utf-16"))
    with pytest.raises(SpecError, match="save the file as UTF-8"):
        load_spec(path)


def test_a_huge_file_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "huge.toml"
    with path.open("wb") as file:
        file.truncate(2_000_000)
    with pytest.raises(SpecError, match="larger than 1000000 bytes"):
        load_spec(path)


# Lines.


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterable[tuple[str | int, ...]]:
    """The path of every key, table and array element."""
    if path:
        yield path
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from paths_of(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths_of(item, (*path, index))


TOML = '''\
# comment = 1
title = "a # b" # c = "d"
"quoted \\"key\\"" = 1
'lit.eral' . sub = """
not a key = 1
"quotes"""
[a . "b".c] # header
k.l.m = [ # comment ]
  1, { x = 1, y = [2, "]"] },
]
n = 2
[[list]]
x = 1
[list.sub]
y = { z = { w = [] } , v = 'a}' }
[[list]]
[[list.inner]]
[[list.inner]]
q = 1
[list.inner.deep]
t = true
'''


def test_lines_of_every_kind_of_key():
    tomllib.loads(TOML)
    lines = key_lines(TOML)
    text = TOML.split("\n")
    for path, start in {
        ("title",): "title",
        ('quoted "key"',): '"quoted',
        ("lit.eral", "sub"): "'lit.eral'",
        ("a", "b"): "[a . ",
        ("a", "b", "c"): "[a . ",
        ("a", "b", "c", "k", "l", "m"): "k.l.m",
        ("a", "b", "c", "n"): "n = 2",
        ("list", 0, "sub", "y"): "y = {",
        ("list", 1, "inner", 1, "q"): "q = 1",
        ("list", 1, "inner", 1, "deep", "t"): "t = ",
    }.items():
        assert text[lines[path] - 1].startswith(start), path
    assert lines["list", 1] == text.index("[[list]]", lines["list", 0]) + 1


def test_a_mistake_in_a_list_over_several_lines_is_told_where_the_list_begins(problems):
    text = "[space]\nunits = { choices = [\n  3,\n  0,\n] }\n"
    (problem,) = problems(SMALL + text)
    assert (problem.key, problem.line) == ("space.units.choices.1", SMALL.count("\n") + 2)


keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)
leaves = (
    st.integers(-5, 5)
    | st.booleans()
    | st.floats(allow_nan=False)
    | st.text(st.sampled_from("ab\"'#[]{}=,.\\\n \t"), max_size=8)
)
documents = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=12,
    ),
    max_size=5,
)


@same_every_time
@given(document=documents, multiline=st.booleans())
def test_the_lines_of_any_document_are_lines_of_it(document, multiline):
    text = tomli_w.dumps(document, multiline_strings=multiline)
    number_of_lines = text.count("\n") + 1
    assert all(1 <= line <= number_of_lines for line in key_lines(text).values())


@same_every_time
@given(text=st.text(st.sampled_from("ab=.[]{}\"'#\n ,1-")))
def test_no_text_that_the_parser_accepts_confuses_the_lines(text):
    with contextlib.suppress(tomllib.TOMLDecodeError):
        tomllib.loads(text)
        assert all(path[0] is not None for path in key_lines(text))


@same_every_time
@given(document=documents)
def test_no_document_makes_anything_but_a_spec_error(document):
    with pytest.raises(SpecError):
        spec_from_document(document)


BAD_VALUES: list[Any] = [
    *(0, -1, 1e308, math.nan, math.inf, True, "", "x", [], {}, [[]], {"choices": [None]}),
    *({"low": 1}, {"low": "a", "high": []}, {"low": 2, "high": 1, "step": -1, "log": 3}, 10**400),
]


def test_no_value_anywhere_makes_anything_but_a_spec_error():
    for path in paths_of(spec_document()):
        for value in BAD_VALUES:
            document = spec_document()
            at: Any = document
            for step in path[:-1]:
                at = at[step]
            at[path[-1]] = value
            with contextlib.suppress(SpecError):
                spec_from_document(document)


def spec_document() -> dict[str, Any]:
    return copy.deepcopy(DOCUMENT)


DOCUMENT = load_spec(STUDIES / "solubility.toml").to_document()


# The JSON schema.


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_schema_accepts_the_shipped_files_and_their_documents(validator, path):
    validator.validate(tomllib.loads(path.read_text(encoding="utf-8")))
    validator.validate(load_spec(path).to_document())


@pytest.mark.parametrize(
    "text",
    [
        '[training]\npatience = "none"',
        'truncate = "middle"\nunknown = "mask"\n[training]\nclass_weights = "balanced"',
        "truncate = true",
        "[space]\nmasking = { choices = [true, false] }\nblock12 = { filters = 3 }",
        "[space]\nconv_l2 = { low = 1e-6, high = 1, log = true }",
        "[space.output]\ndense_dropout = { low = 0.1, high = 0.2, step = 0.1 }",
        '[[known]]\nblock1.kernel_size = 5\nhead = "flatten"',
    ],
)
def test_the_schema_accepts_what_the_format_allows(validator, text):
    validator.validate(tomllib.loads(SMALL + text))


@pytest.mark.parametrize(
    "text",
    [
        "zzz = 1",
        "max_length = 0",
        "split.test = 1",
        "split.seed = -1",
        "truncate = 'left'",
        "unknown = 'X'",
        "columns.labels = 'y'",
        "[training]\nprecision = 'fp32'",
        "[training]\npatience = 'x'",
        "[training]\npatience = 0",
        "[hyperband]\neta = 1",
        "[sampler]\nkind = 'grid'",
        "[space]\nkernal_size = 3",
        "[space]\nkernel_size = 0",
        "[space]\nkernel_size = [3, 5]",
        "[space]\nkernel_size = { low = 3 }",
        "[space]\nkernel_size = { low = 3, high = 5.5 }",
        "[space]\nkernel_size = { choices = [] }",
        "[space]\nkernel_size = { choices = [3, 3] }",
        "[space]\nkernel_size = { choices = [3], low = 1 }",
        "[space]\nactivation = 'swsh'",
        "[space]\nactivation = { choices = ['swsh'] }",
        "[space]\nactivation = { low = 1, high = 2 }",
        "[space]\nmasking = 'yes'",
        "[space]\nconv_dropout = 1.0",
        "[space]\nlearning_rate = 0",
        "[space.block0]\nfilters = 3",
        "[space.block1]\nunits = 3",
        "[space.output]\nunits = 3",
        "[[known]]\nunits = { low = 1, high = 3 }",
        "[[known]]\nzzz = 1",
        "known = 3",
    ],
)
def test_the_schema_refuses_what_the_format_does(validator, problems, text):
    assert list(validator.iter_errors(tomllib.loads(SMALL + text)))
    assert problems(SMALL + text)


@pytest.mark.parametrize("key", ["name", "trials", "data"])
def test_the_schema_knows_what_a_file_must_have(validator, key):
    document = tomllib.loads(SMALL)
    del document[key]
    assert list(validator.iter_errors(document))


@pytest.mark.parametrize("name", ["", "a/b", ".a", "a" * 81])
def test_the_schema_knows_what_a_name_may_be(validator, name):
    assert list(validator.iter_errors(tomllib.loads(SMALL) | {"name": name}))


def test_every_hyperparameter_is_described_in_the_schema():
    properties = json_schema()["properties"]["space"]["properties"]
    described = [key for key, value in properties.items() if value.get("description")]
    assert {"output", *described} == {"output", *SearchSpace.of({}).to_document()}
    assert properties["activation"]["anyOf"][0] == {"enum": ["relu", "tanh", "gelu", "swish"]}


def test_no_warning_comes_from_the_schema():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        json_schema()
