"""Records of every format, those that earlier versions stored among them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import IDENTITY, fake_train, make_study, small_spec
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.errors import StudyError
from tuner.search import formats, overlap, record
from tuner.search.attributes import RECORD_KEY
from tuner.search.formats import DEFAULTS_OF_FORMAT, FORMAT, RecordError, completed
from tuner.search.objective import Objective
from tuner.search.record import record_document, record_from_document
from tuner.search.study import create_or_resume, delete, load
from tuner.search.tuned_study import TunedStudy
from tuner.spec import reader, space, tables
from tuner.spec.architecture import KEYS
from tuner.spec.spec import ColumnSettings, Settings, StudySpec, TrainingSettings

SMALL_SPACE = small_spec().space.to_document()
SPACE = {
    "embedding_dim": 8, "embedding_dropout": 0.0, "masking": True, "arrangement": "stacked",
    "blocks": {"low": 1, "high": 2}, "kernel_size": 3, "filters": {"choices": [2, 4]},
    "padding": "same", "normalization": "none", "activation": "relu", "residual": "none",
    "pooling": "max", "pool_size": 2, "conv_dropout": 0.0, "head": "global_max",
    "dense_layers": 1, "units": 4, "dense_dropout": 0.2, "conv_l1": 0.0, "conv_l2": 0.0,
    "dense_l1": 0.0, "dense_l2": 0.0, "bias_l2": 0.0, "activity_l2": 0.0, "optimizer": "adam",
    "learning_rate": {"low": 0.001, "high": 0.01, "log": True}, "batch_size": 32,
}  # fmt: skip

#: The first record that there was: no [stop], rungs counted up and not recorded, patience 5.
FIRST: Mapping[str, Any] = {
    "development_sha256": "d" * 64,
    "precision": "auto",
    "sampler": {"class": "TPESampler", "multivariate": False, "constant_liar": True},
    "pruner": {"class": "HyperbandPruner", "min_epochs": 1, "eta": 4},
    "versions": {"python": "3.11.7", "tuner": "0.1.0", "optuna": "5.0.0"},
    "folder": "small-0123abcd",
    "created_at": "2026-11-22T12:00:00+00:00",
    "spec": {
        "name": "small",
        "trials": 12,
        "seed": 3,
        "data": {
            "source": "rows.csv",
            "max_length": 40,
            "truncate": False,
            "split": {"rule": "random", "seed": 1, "validation": 0.2, "test": 0.2},
        },
        "training": {
            "max_epochs": 20,
            "patience": 5,
            "precision": "auto",
            "max_trial_seconds": 3600.0,
        },
        "hyperband": {"min_epochs": 1, "eta": 4},
        "sampler": {"kind": "tpe"},
        "space": SPACE,
        "known": [],
    },
    "spec_hash": "1" * 64,
    "spec_folder": "/studies",
    "data": {
        "source": "rows.csv",
        "synthetic": False,
        "sha256": "a" * 64,
        "split_id": "b" * 64,
        "split_seed": 1,
        "max_length": 40,
        "training_rows": 8,
        "validation_rows": 1,
        "test_rows": 1,
    },
}


def changed(document: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A record with other values; "__" stands for the dots of a key."""
    new = copy.deepcopy(dict(document))
    for key, value in values.items():
        *tables, name = key.split("__")
        table = new
        for part in tables:
            table = table[part]
        table[name] = value
    return new


#: Records of each format, by what is special in them. A new format adds one of its own here,
#: but for one that adds hyperparameters alone.
DOCUMENTS: dict[int, dict[str, Mapping[str, Any]]] = {
    1: {
        "the first": FIRST,
        "without Hyperband": changed(
            {**FIRST, "spec": {k: v for k, v in FIRST["spec"].items() if k != "hyperband"}},
            pruner={"class": "NopPruner"},
        ),
        "of commit 5caba31": changed(
            FIRST, pruner={"class": "Hyperband", "min_epochs": 1, "eta": 4, "brackets": "in turn"}
        ),
        "with a stop rule": changed(FIRST, spec__stop={"patience": 60, "min_delta": 0.001}),
        "with its rungs": changed(FIRST, pruner__rungs=[1, 5]),
    },
    2: {"the first": changed(FIRST, format=2, pruner__rungs=[1, 5])},
}


def with_hyperparameters_of(number: int) -> dict[str, Any]:
    """The record of a format that has hyperparameters more than the one before."""
    added = {name: one.default for name, one in KEYS.items() if 1 < one.since <= number}
    before = DOCUMENTS[number - 1]["the first"]
    return changed(before, format=number, spec__space={**SPACE, **added})


DOCUMENTS[3] = {"the first": with_hyperparameters_of(3)}
OF_FORMAT_4 = changed(
    with_hyperparameters_of(4),
    spec__data__columns={"sequence": "sequence", "label": "label"},
    spec__data__unknown="error",
    spec__data__conflicts="error",
    spec__training__class_weights="none",
)
del OF_FORMAT_4["spec"]["data"]["truncate"]  # false before; what is None is not written
DOCUMENTS[4] = {
    "the first": OF_FORMAT_4,
    "with every choice": changed(
        OF_FORMAT_4,
        spec__data__columns={"sequence": "fasta", "label": "soluble", "weight": "sure"},
        spec__data__truncate="middle",
        spec__data__unknown="mask",
        spec__data__conflicts="drop",
        spec__training__class_weights="balanced",
    ),
}
for number in range(5, FORMAT + 1):
    DOCUMENTS.setdefault(number, {"the first": with_hyperparameters_of(number)})
EACH = [
    pytest.param(number, document, id=f"{number}, {name}")
    for number, documents in DOCUMENTS.items()
    for name, document in documents.items()
]


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a record, without those that are the user's or another program's."""
    for key, item in value.items():
        path = f"{prefix}{key}"
        yield path
        whole = ("versions", "pruner", "sampler", "spec.provenance")
        if isinstance(item, Mapping) and path not in whole and prefix != "spec.space.":
            yield from paths(item, f"{path}.")


EVERYTHING = {
    "hyperband": {"min_epochs": 1, "eta": 4},
    "stop": {"patience": 60},
    "notify": {},
    "provenance": {"study": "other"},
    "data": {"source": "solubility", "fallback": "synthetic", "truncate": "end"},
    "training": {"as_trial": 3, "max_epochs": 20},
}


def stored_today(tmp_path: Path) -> dict[str, Any]:
    """The record that this version stores of a study file with every key."""
    made = make_study(tmp_path, small_spec(**EVERYTHING))
    made.storage.close()
    return record_document(made.record)


def test_every_format_has_its_defaults_and_documents() -> None:
    assert sorted(DEFAULTS_OF_FORMAT) == sorted(DOCUMENTS) == list(range(1, FORMAT + 1))


@pytest.mark.parametrize(("number", "document"), EACH)
def test_what_a_record_of_a_format_lacks_has_a_meaning(
    number: int, document: Mapping[str, Any], tmp_path: Path
) -> None:
    """Where this fails, a key was added: `docs/decisions.md` says what else has to be done."""
    lacking = set(paths(stored_today(tmp_path))) - set(paths(document)) - {"format"}
    meant = DEFAULTS_OF_FORMAT[number]
    assert not [
        path
        for path in lacking
        if not any(path == key or path.startswith(f"{key}.") for key in meant)
    ]


def test_a_key_that_is_written_since_an_earlier_commit_has_a_format_of_its_own(
    tmp_path: Path,
) -> None:
    optional = set(DEFAULTS_OF_FORMAT[FORMAT])
    written = {
        path
        for path in paths(stored_today(tmp_path))
        if not any(path == key or path.startswith(f"{key}.") for key in optional)
    }
    assert written <= {*paths(DOCUMENTS[FORMAT]["the first"])}


@pytest.mark.parametrize(("number", "document"), EACH)
def test_a_record_of_every_format_is_read(number: int, document: Mapping[str, Any]) -> None:
    before = copy.deepcopy(document)
    read = record_from_document(document)
    assert document == before
    assert completed(document).get("format", 1) == number
    assert read.spec_hash == "1" * 64  # what was stored, whatever this version computes
    assert (read.spec.seed, read.spec.training.patience) == (3, 5)
    assert read.spec.folder == Path("/studies")
    assert (read.data.test_rows, read.folder) == (1, "small-0123abcd")
    assert read.spec.training.as_trial is None
    assert read.spec.data.fallback is None


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_earlier_formats_knew_of_truncation_is_read(number: int) -> None:
    document = DOCUMENTS[number]["the first"]
    for stored, meant in ((False, None), (True, "end")):
        read = record_from_document(changed(document, spec__data__truncate=stored))
        assert read.spec.data.truncate == meant
        assert read.spec.data.unknown == "error"
        assert read.spec.data.columns == ColumnSettings()
        assert read.spec.training.class_weights == "none"


def test_a_study_file_that_says_true_continues_a_study_that_says_where(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec(data={"source": "synthetic", "truncate": True}))
    assert made.record.spec.to_document()["data"]["truncate"] == "end"
    its = {"source": "synthetic", "truncate": "end"}
    assert launch(made, small_spec(data=its)).id == made.id
    with pytest.raises(StudyError, match=r"differs: data\.truncate \('end', now 'start'\)\."):
        launch(made, small_spec(data={**its, "truncate": "start"}))
    made.storage.close()


def test_what_is_absent_from_a_record_is_what_it_meant_then() -> None:
    first = DOCUMENTS[1]
    assert record_from_document(first["the first"]).spec.rungs == (1, 4, 16)
    assert record_from_document(first["with its rungs"]).spec.rungs == (1, 5)
    assert record_from_document(first["without Hyperband"]).spec.hyperband is None
    assert record_from_document(first["the first"]).spec.stop is None
    assert record_from_document(first["with a stop rule"]).spec.stop is not None


def store(made: TunedStudy, document: Mapping[str, Any]) -> None:
    made.study.set_user_attr(RECORD_KEY, dict(document))


def launch(made: TunedStudy, spec: StudySpec) -> TunedStudy:
    return create_or_resume(
        made.storage,
        spec,
        IDENTITY,
        development_sha256="c" * 64,
        artifacts_root=made.artifacts.folder.parent,
    )


def as_format_1(made: TunedStudy) -> dict[str, Any]:
    document = made.study.user_attrs[RECORD_KEY]
    del document["format"]
    store(made, document)
    return document


# --- whether a launch continues a study ---


def test_a_hash_decides_nothing(tmp_path: Path) -> None:
    made = make_study(tmp_path)
    store(made, made.study.user_attrs[RECORD_KEY] | {"spec_hash": "f" * 64})
    resumed = launch(made, small_spec())
    assert (resumed.id, resumed.record.spec_hash) == (made.id, "f" * 64)
    made.storage.close()


def test_a_launch_never_rewrites_what_an_earlier_format_stored(tmp_path: Path) -> None:
    made = make_study(tmp_path)
    document = as_format_1(made)
    assert launch(made, small_spec()).study.user_attrs[RECORD_KEY] == document
    moved = small_spec().model_copy(update={"folder": tmp_path / "elsewhere"})
    renewed = launch(made, moved)
    assert renewed.study.user_attrs[RECORD_KEY] == {
        **document, "spec_folder": str(tmp_path / "elsewhere"),
    }  # fmt: skip
    made.storage.close()


def test_a_file_that_leaves_a_key_out_continues_a_study_of_an_earlier_default(
    tmp_path: Path,
) -> None:
    made = make_study(tmp_path, small_spec(training={"max_epochs": 9, "patience": 5}))
    resumed = launch(made, small_spec())  # its default was 5
    assert resumed.id == made.id
    assert resumed.record.spec.training.patience == 5
    with pytest.raises(StudyError, match=r"differs: training\.patience \(5, now 8\)\."):
        launch(made, small_spec(training={"max_epochs": 9, "patience": 8}))
    made.storage.close()
    other = make_study(
        tmp_path, small_spec(name="other", training={"max_epochs": 9, "patience": 4})
    )
    with pytest.raises(StudyError, match=r"differs: training\.patience \(4, now 8\)\."):
        launch(other, small_spec(name="other"))
    other.storage.close()


class TrainingOfTomorrow(TrainingSettings):
    warmup_epochs: int = 0
    """an imaginary key"""


class SettingsOfTomorrow(Settings):
    training: TrainingOfTomorrow = TrainingOfTomorrow()


class SpecOfTomorrow(StudySpec):
    training: TrainingOfTomorrow = TrainingOfTomorrow()


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that adds `training.warmup_epochs`, and a format with it."""
    added = {"spec.training.warmup_epochs": 0}
    earlier = {number: {**known, **added} for number, known in DEFAULTS_OF_FORMAT.items()}
    table = {**earlier, FORMAT + 1: DEFAULTS_OF_FORMAT[FORMAT]}
    monkeypatch.setattr(formats, "DEFAULTS_OF_FORMAT", table)
    for module in (formats, record):
        monkeypatch.setattr(module, "FORMAT", FORMAT + 1)
    monkeypatch.setattr(reader, "Settings", SettingsOfTomorrow)
    monkeypatch.setattr(reader, "StudySpec", SpecOfTomorrow)


@pytest.mark.parametrize("number", [1, FORMAT])
def test_a_new_key_with_a_default_leaves_an_existing_study_what_it_is(
    number: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    made = make_study(tmp_path)
    if number == 1:
        as_format_1(made)
    today = small_spec()
    request.getfixturevalue("tomorrow")
    assert small_spec().spec_hash != today.spec_hash
    resumed = launch(made, small_spec())
    assert resumed.id == made.id
    assert resumed.record.spec.to_document()["training"]["warmup_epochs"] == 0
    assert resumed.record.spec_hash == today.spec_hash
    asked = small_spec(training={"max_epochs": 9, "warmup_epochs": 3})
    with pytest.raises(StudyError, match=r"differs: training\.warmup_epochs \(0, now 3\)\."):
        launch(made, asked)
    made.storage.close()


def test_a_new_key_may_have_another_default_than_what_its_absence_meant(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_study(tmp_path)
    request.getfixturevalue("tomorrow")
    known = formats.DEFAULTS_OF_FORMAT[FORMAT]
    table = {**formats.DEFAULTS_OF_FORMAT, FORMAT: {**known, "spec.training.warmup_epochs": 7}}
    monkeypatch.setattr(formats, "DEFAULTS_OF_FORMAT", table)
    resumed = launch(made, small_spec())  # the file leaves the key out
    assert resumed.record.spec.to_document()["training"]["warmup_epochs"] == 7
    with pytest.raises(StudyError, match=r"training\.warmup_epochs \(7, now 0\)"):
        launch(made, small_spec(training={"max_epochs": 9, "warmup_epochs": 0}))
    made.storage.close()


def test_a_new_hyperparameter_leaves_an_existing_study_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_study(tmp_path)
    as_format_1(made)
    added = {"spec.space.label_smoothing": 0.1}
    table = {number: {**known, **added} for number, known in DEFAULTS_OF_FORMAT.items()}
    monkeypatch.setattr(formats, "DEFAULTS_OF_FORMAT", table)
    keys = {
        **KEYS,
        "label_smoothing": replace(KEYS["embedding_dropout"], name="label_smoothing", default=0.1),
    }
    for module in (space, tables):
        monkeypatch.setattr(module, "KEYS", keys)
    resumed = launch(made, small_spec())
    assert resumed.id == made.id
    assert resumed.record.spec.space.to_document()["label_smoothing"] == 0.1
    its_space = {**SMALL_SPACE, "label_smoothing": 0.2}
    with pytest.raises(StudyError, match=r"space\.label_smoothing \(0\.1, now 0\.2\)"):
        launch(made, small_spec(space=its_space))
    made.storage.close()


# --- records of a later version ---


LATER = {
    "a later format": (
        {"format": FORMAT + 1},
        rf"is stored in format {FORMAT + 1} by tuner 9\.1, .* up to {FORMAT}: upgrade",
    ),
    "no number": ({"format": "2"}, r"is stored in format '2' by tuner 9\.1, "),
    "a list": ({"format": [2]}, r"is stored in format \[2\] by tuner 9\.1, "),
    "a key": ({"warmup": 1}, r"keys that this tuner does not know \(warmup\).*: upgrade"),
    "a key of the data": ({"data__kind": 1}, r"does not know \(data\.kind\).*: upgrade"),
}


@pytest.mark.parametrize(("values", "message"), LATER.values(), ids=LATER.keys())
def test_a_record_of_a_later_version_is_refused_and_stays_whole(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = make_study(tmp_path)
    made.study.optimize(Objective(made.record.spec, fake_train), n_trials=1)
    made.artifacts.weights(0).parent.mkdir(parents=True)
    made.artifacts.weights(0).write_bytes(b"w")
    document = changed(made.study.user_attrs[RECORD_KEY], versions={"tuner": "9.1"}, **values)
    store(made, document)
    for act in (
        lambda: load(made.storage, "small", artifacts_root=tmp_path / "artifacts"),
        lambda: launch(made, small_spec(trials=99)),
        lambda: delete(load(made.storage, "small", artifacts_root=tmp_path / "artifacts")),
    ):
        with pytest.raises(StudyError, match=f"Study 'small' in sqlite.* {message}"):
            act()
    assert made.study.user_attrs[RECORD_KEY] == document
    assert made.study.user_attrs["trials"] == 12
    assert len(made.study.trials) == 1
    assert made.artifacts.weights(0).read_bytes() == b"w"
    made.storage.close()


def test_a_study_of_a_later_version_does_not_hide_the_others(tmp_path: Path) -> None:
    made, other = (make_study(tmp_path, small_spec(name=name)) for name in ("new", "old"))
    store(made, {"format": FORMAT + 1})
    where = ["--storage", made.storage.url, "--artifacts", str(tmp_path / "artifacts")]
    shown = CliRunner().invoke(app, ["status", *where])
    assert shown.exit_code == 0
    assert "old" in shown.stdout
    assert (
        f"Study 'new' in {made.storage.masked_url} is stored in format {FORMAT + 1}, and this"
        in (shown.stderr)
    )
    assert list(overlap._records(other.storage)) == ["old"]
    made.storage.close()
    other.storage.close()


DAMAGED = {
    "keys are missing": ({"spec": "x"}, "without created_at, data, development_sha256, folder"),
    "no table": (changed(FIRST, spec="x"), "spec is 'x', and no table"),
    "no data": (changed(FIRST, data={}), "without data.max_length"),
    "a study file": (changed(FIRST, spec__trials=0), "study file that cannot be read: trials: "),
}


@pytest.mark.parametrize(("document", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_record_says_what_is_wrong(document: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record_from_document(document)
