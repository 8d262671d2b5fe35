from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w
import yaml

from tuner.errors import SpecError
from tuner.spec import load_spec

STUDIES = Path(__file__).resolve().parent.parent / "studies"


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
        ("a.json", '{\n"name": "x",\n"trails": 3,\n"data": {"source": "synthetic"}}', 3, "trials"),
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
