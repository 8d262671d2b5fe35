from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml
from folders import STUDIES

from tuner.coordination.queue import overrides_for
from tuner.errors import Problem, SpecError
from tuner.spec.reader import load_spec, spec_from_document


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".toml"])
def test_a_study_file_means_the_same_in_every_format(tmp_path: Path, suffix: str) -> None:
    document = load_spec(STUDIES / "solubility.toml").to_document()
    document["provenance"] = {"study": "solubility", "data": {"rows": 3}}
    path = tmp_path / f"again{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(document))
    elif suffix == ".toml":
        path.write_text(tomli_w.dumps(document))
    else:
        path.write_text(yaml.safe_dump(document))
    spec = load_spec(path)
    assert spec.spec_hash == load_spec(STUDIES / "solubility.toml").spec_hash
    assert spec.provenance == document["provenance"]


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("a.json", '{\n "name": "x",\n}', 3, "not valid JSON"),
        ("a.yaml", "name: x\n  trials: 3\n", 2, "not valid YAML"),
        ("a.yaml", "- 1\n- 2\n", None, "holds no keys"),
        ("a.yaml", "name: x\ntrials: 0\ndata: {source: synthetic}\n", 2, "at least 1"),
        (
            "a.json",
            '{\n"name": "x",\n"trails": 3,\n"data": {"source": "synthetic"}}',
            None,
            "trials",
        ),
        ("a.yaml", "name: x\ntrials: 1\ndata:\n  source: synthetic\n  max_length: a\n", 5, "whole"),
    ],
)
def test_a_mistake_in_json_or_yaml_names_its_line(
    tmp_path: Path, name: str, text: str, line: int | None, words: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert (caught.value.problems[0].line, words in str(caught.value)) == (line, True), caught.value


def test_what_json_calls_null_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"name": "x", "trials": 1, "data": {"source": "synthetic"}, "hyperband": None})
    )
    assert load_spec(path).hyperband is None


GOOD = {"name": "x", "trials": 1, "data": {"source": "synthetic"}}
Y = "name: x\ntrials: 1\ndata: {source: synthetic}\n"
T = 'name = "x"\ntrials = 1\ndata = { source = "synthetic" }\n'
DIGITS = "1" * 5000


def refused(tmp_path: Path, suffix: str, text: str, *overrides: str) -> Problem:
    path = tmp_path / f"study{suffix}"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    (problem,) = caught.value.problems
    return problem


def json_with(more: str) -> str:
    return f"{json.dumps(GOOD)[:-1]},\n{more}}}"


@pytest.mark.parametrize(
    ("suffix", "text", "line", "words"),
    [
        # nested too deeply
        (".toml", T + "x = " + "[\n" * 400_000, None, "nested too deeply"),
        (".toml", T + "x = " + "[" * 900_000, 4, "is a line of more than 1,000 characters"),
        (".toml", T + "a." * 50_000 + "a = 1", 4, "is a line of more than 1,000 characters"),
        (".json", json_with('"x": ' + "[" * 900_000), None, "nested too deeply"),
        (".json", json_with('"x": ' + "[" * 40 + "]" * 40), None, "nested too deeply"),
        (".json", json_with('"x": ' + '{"a":' * 50_000 + "1" + "}" * 50_000), None, "too deeply"),
        (".yaml", Y + "x: " + "[" * 900_000, 4, "nested too deeply"),
        (".yaml", Y + "".join(f"{' ' * n}a:\n" for n in range(1_000)), 36, "nested too deeply"),
        # an alias, which may stand for itself, or for what makes a short text a long one
        (".yaml", Y + "x: &a [*a]\n", 4, "has the alias *a; write the value out"),
        (".yaml", Y + "x: &a {b: *a}\n", 4, "has the alias *a"),
        (".yaml", Y + "a: &a {b: 1}\nc:\n  <<: *a\n", 6, "has the alias *a"),
        # more than any study file holds
        (".toml", T + "x = [" + "1,\n" * 60_000 + "]", None, "holds more than 50000 values"),
        (".json", json_with(f'"x": [{"1," * 60_000}1]'), None, "holds more than 50000 values"),
        (".yaml", Y + f"x: [{'1,' * 60_000}]", None, "holds more than 50000 values"),
        (".toml", T + "".join(f"k{n} = 1\n" for n in range(300)), None, "of more than 200 keys"),
        (".json", json_with(", ".join(f'"k{n}": 1' for n in range(300))), None, "of more than 200"),
        (".yaml", Y + "".join(f"k{n}: 1\n" for n in range(300)), 1, "of more than 200 keys"),
        # a key twice
        (".json", json_with('"trials": 3'), None, 'the key "trials" stands twice'),
        (".json", json_with('"space": {\n"units": 3,\n"\\u0075nits": 4}'), None, "stands twice"),
        (".yaml", Y + "trials: 5\n", 4, 'the key "trials" stands twice'),
        (".yaml", Y + "space:\n  units: 3\n  'units': 4\n", 6, 'the key "units" stands twice'),
        # keys that are no text
        (".yaml", Y + "space:\n  1: 2\n", 5, 'the key "1" is not text; write it in quotes'),
        (".yaml", Y + "no: 1\n", 4, 'the key "no" is not text'),
        (".yaml", Y + "~: 1\n", 4, 'the key "~" is not text'),
        (".yaml", Y + "2026-01-31: 1\n", 4, 'the key "2026-01-31" is not text'),
        (".yaml", Y + "? [a, b]\n: 1\n", 4, "a key is not text"),
        # what YAML 1.1 takes for something else
        (".yaml", Y.replace("x\n", "2026-01-31\n", 1), 1, '"2026-01-31" is a date in YAML'),
        (".yaml", Y.replace("x\n", "2026-13-45\n", 1), 1, '"2026-13-45" is a date in YAML'),
        (".yaml", Y + "seed: 1:30\n", 4, '"1:30" is a number to another base'),
        (".yaml", Y + "seed: 010\n", 4, '"010" is a number to another base'),
        (".yaml", Y + "seed: 0b_\n", 4, '"0b_" is a number to another base'),
        (".yaml", Y + "training: {max_trial_seconds: 1:30.5}\n", 4, "to another base"),
        (".yaml", Y + "space: {learning_rate: 1e-3}\n", 4, "in YAML as 0.001)"),
        (".yaml", Y + "space: {learning_rate: 1e-5}\n", 4, "in YAML as 1.0e-05)"),
        (".yaml", Y + "seed: 1e3\n", 4, "in YAML as 1000)"),
        # tags, documents, directives, characters
        (".yaml", Y + "x: !!python/object/apply:os.system [ls]\n", 4, "python/object/apply"),
        (".yaml", Y + "x: !!binary aGk=\n", 4, "has the tag"),
        (".yaml", Y + "x: !!set {a}\n", 4, "has the tag"),
        (".yaml", Y + "x: !!bool a\n", 4, "has the tag"),
        (".yaml", f"{Y}---\n{Y}", 4, "holds more than one document"),
        (".yaml", f"%YAML 1.{DIGITS}\n---\n{Y}", 1, "not valid YAML"),
        (".yaml", Y + 'x: "\\UFFFFFFFF"\n', 4, "not valid YAML"),
        (".yaml", Y + "x: \a\n", None, "U+0007 is not allowed"),
        (".yaml", Y + "<<: 3\n", 4, 'the key "<<" is not text'),
        # numbers
        (".toml", T + f"seed = {DIGITS}", 4, "is a line of more than 1,000 characters"),
        (".json", json_with(f'"seed": {DIGITS}'), None, "a number of thousands of digits"),
        (".yaml", Y + f"seed: {DIGITS}\n", 4, "a number of thousands of digits"),
        (".json", json_with('"seed": NaN'), 2, "not valid JSON: NaN"),
        (".json", json_with('"seed": -Infinity'), 2, "not valid JSON: -Infinity"),
        (".json", json_with('"training": {"max_trial_seconds": 1e400}'), None, "a finite number"),
        (".yaml", Y + "training: {max_trial_seconds: 1.0e+400}\n", 4, "a finite number"),
        (".yaml", Y + "training: {max_trial_seconds: .nan}\n", 4, "a finite number"),
        (".toml", T + f"[space.block{DIGITS[:900]}]", 4, "unknown key"),
        # half of a surrogate pair
        (".json", json_with('"data": "\\ud800"').replace('"data": {', '"seed": {'), None, "U+D800"),
        (".json", json_with('"\\udfff": 1'), None, "U+DFFF"),
        (".json", json_with('"provenance": {"a": ["\\ud83d"]}'), None, "U+D83D"),
        # what cannot be stored, or written in every format
        (".toml", T + "provenance.at = 2026-01-31", 4, "at must be text in quotes, or a number"),
        (".toml", T + "provenance.a.b = nan", 4, "a.b must be a finite number, not nan"),
        (".json", json_with('"provenance": {"a": [1e400]}'), None, "a must be a finite number"),
    ],
)  # fmt: skip
def test_every_format_is_read_with_the_same_care(
    tmp_path: Path, suffix: str, text: str, line: int | None, words: str
) -> None:
    problem = refused(tmp_path, suffix, text)
    assert (problem.line, words in problem.message) == (line, True), problem
    assert len(str(problem)) < 800


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"seed={DIGITS}", "has more than 1,000 characters; write it into the study file"),
        (f"{DIGITS[:900]}=1", "unknown key"),
        (f"known.{DIGITS[:900]}=1", "name an element by its number"),
        ("a." * 50_000 + "a=1", "has more than 1,000 characters"),
        ("a." * 400 + "a=1", "nested too deeply"),
        ("x=" + "[" * 40 + "]" * 40, "nested too deeply"),
        ("data.source='\udcff.csv'", "U+DCFF"),
        ("name=\udcff", "no TOML value"),
    ],
)
def test_an_override_is_read_with_the_same_care(tmp_path: Path, override: str, words: str) -> None:
    problem = refused(tmp_path, ".toml", f"known = []\n{T}", override)
    assert words in problem.message
    assert len(str(problem)) < 800


@pytest.mark.parametrize("document", [{"x": 1}, {"x": [1]}], ids=["keys", "lists"])
def test_a_document_without_a_file_has_the_same_limits(document: dict[str, Any]) -> None:
    for _ in range(100):
        document = {"x": document}
    with pytest.raises(SpecError, match="nested too deeply"):
        spec_from_document(GOOD | document)
    itself: dict[str, Any] = {}
    itself["space"] = itself
    with pytest.raises(SpecError, match="nested too deeply"):
        spec_from_document(itself)
    with pytest.raises(SpecError, match="1: is a key that is not text"):
        spec_from_document({**GOOD, "space": {1: 2}})  # type: ignore[dict-item]


def test_a_list_of_mistakes_is_told_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    for text in ("known = [" + "{ foo = 1 },\n" * 20_000 + "]",
                 "space.units = { choices = [" + "0,\n" * 40_000 + "] }"):  # fmt: skip
        path.write_text(T + text)
        with pytest.raises(SpecError, match="100 mistakes were found up to here") as caught:
            load_spec(path)
        assert len(caught.value.problems) == 101


def test_numbers_and_words_mean_what_they_did(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(Y + "seed: 0x10\nspace: {units: 1_0, learning_rate: 1.0e-3, masking: yes}\n")
    spec = load_spec(path)
    config = spec.space.resolve({})
    assert (spec.seed, config.dense[0].units, config.learning_rate) == (16, 10, 0.001)
    assert config.masking is True


def test_json_with_tabs_and_odd_line_ends_names_its_keys(tmp_path: Path) -> None:
    text = '{\n\t"name": "x\\t\u2028",\n\t"trials": 0,\n\t"data": {"source": "synthetic"}}'
    path = tmp_path / "study.json"
    path.write_bytes(b"\xef\xbb\xbf" * 2 + text.encode())
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert [one.key for one in caught.value.problems] == ["name", "trials"]


def test_null_in_a_provenance_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps(GOOD | {"provenance": {"a": None, "b": [None, {"c": None}]}}))
    assert load_spec(path).to_document()["provenance"] == {"b": [{}]}


def test_a_letter_beyond_u_ffff_is_one_letter_in_every_format(tmp_path: Path) -> None:
    name = "\U0001f600 \U00020000"
    for suffix, text in (
        (".json", json.dumps(GOOD | {"name": name})),
        (".yaml", yaml.safe_dump(GOOD | {"name": name})),
        (".toml", tomli_w.dumps(GOOD | {"name": name})),
    ):
        (tmp_path / f"study{suffix}").write_text(text, encoding="utf-8")
        assert load_spec(tmp_path / f"study{suffix}").name == name
    assert load_spec(tmp_path / "study.toml", overrides_for(name, None)).name == name
