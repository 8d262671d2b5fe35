"""Exports to MLflow and TensorBoard: what they hold, and that a second one repeats nothing."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_study import WINNER, finished_study, storage_in
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.errors import SetupError, TunerError
from tuner.results.mlflow_export import MlflowExport, export_to_mlflow
from tuner.results.runs import runs_of
from tuner.results.tensorboard_export import export_to_tensorboard
from tuner.search.tuned_study import TunedStudy


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TunedStudy]:
    folder = tmp_path_factory.mktemp("study")
    with storage_in(folder) as storage:
        yield finished_study(storage, folder)


def test_every_trial_that_was_started_is_a_run(tuned: TunedStudy) -> None:
    tuned.study.enqueue_trial({"learning_rate": 0.02})
    runs = list(runs_of(tuned))
    assert [run.trial for run in runs] == [0, 1, 2, 3, 4]
    best = runs[WINNER]
    assert best.parameters == {"learning_rate": 0.01}
    assert [epoch.epoch for epoch, _ in best.curve] == list(range(1, 10))
    assert best.curve[0][1].keys() == {
        "training_loss", "training_accuracy", "validation_loss", "validation_accuracy", "seconds",
    }  # fmt: skip
    assert best.figures == {"best_validation_loss": tuned.ranked()[0].value}
    assert "as_trial = 1" in best.study_file
    assert runs[3].figures == {}  # it diverged: no tracker draws that


# --- MLflow ---


@dataclasses.dataclass
class FakeRun:
    """What MLflow keeps of a run."""

    tags: dict[str, str]
    start: int
    name: str
    metrics: list[Any] = dataclasses.field(default_factory=list)
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    status: str = "RUNNING"
    end: int | None = None


class FakeMlflow:
    """The part of MLflow's client that is used; a page of answers has two runs."""

    def __init__(self) -> None:
        self.experiments: dict[str, Any] = {}
        self.runs: dict[str, FakeRun] = {}
        self.made = 0
        self.fails_at: str | None = None

    def __call__(self, uri: str) -> FakeMlflow:
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = types.SimpleNamespace(experiment_id="7", lifecycle_stage="active")
        return "7"

    def search_runs(
        self, experiments: list[str], query: str, *, max_results: int, page_token: str | None
    ) -> Any:
        assert experiments == ["7"]
        key = query.partition(" = ")[2].strip("'")
        found = [
            types.SimpleNamespace(
                info=types.SimpleNamespace(run_id=identity),
                data=types.SimpleNamespace(tags=run.tags),
            )
            for identity, run in self.runs.items()
            if run.tags["tuner.study"] == key
        ]
        at = int(page_token or 0)
        page = type("Page", (list,), {})(found[at : at + 2])
        page.token = str(at + 2) if at + 2 < len(found) else None
        return page

    def create_run(self, experiment: str, *, start_time: int, tags: Any, run_name: str) -> Any:
        self.made += 1
        self.runs[f"r{self.made}"] = FakeRun(tags=dict(tags), start=start_time, name=run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"r{self.made}"))

    def log_batch(self, run: str, *, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.runs[run].metrics += metrics
        self.runs[run].params |= {one.key: one.value for one in params}
        self.runs[run].tags |= {one.key: one.value for one in tags}

    def log_artifacts(self, run: str, folder: str) -> None:
        if self.runs[run].name == self.fails_at:
            raise OSError("the server is away: http://user:secret@mlflow/api")
        self.runs[run].files = {one.name: one.read_bytes() for one in Path(folder).iterdir()}

    def set_terminated(self, run: str, status: str, end: int | None) -> None:
        self.runs[run].status, self.runs[run].end = status, end

    def delete_run(self, run: str) -> None:
        del self.runs[run]

    def named(self) -> dict[str, FakeRun]:
        assert len({run.name for run in self.runs.values()}) == len(self.runs)
        return {run.name: run for run in self.runs.values()}


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    client = FakeMlflow()

    def module(name: str, **members: object) -> None:
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def record(*fields: str) -> type:
        return dataclasses.make_dataclass("Record", fields)

    module("mlflow", MlflowClient=client)
    module("mlflow.exceptions", MlflowException=type("MlflowException", (Exception,), {}))
    module(
        "mlflow.entities",
        Metric=record("key", "value", "timestamp", "step"),
        Param=record("key", "value"),
        RunTag=record("key", "value"),
    )
    for name in ("TELEMETRY", "HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_{'DISABLE_' if name == 'TELEMETRY' else ''}{name}", "1")
    return client


def test_a_run_has_parameters_curves_and_files(tuned: TunedStudy, mlflow: FakeMlflow) -> None:
    written = export_to_mlflow(tuned, "http://mlflow")
    assert written == MlflowExport(experiment="demo", written=5, replaced=0, unchanged=0)
    runs = mlflow.named()
    assert [run.status for run in runs.values()] == [
        "FINISHED", "FINISHED", "KILLED", "KILLED", "FAILED",
    ]  # fmt: skip
    best = runs[f"trial-{WINNER}"]
    assert best.params == {"learning_rate": "0.01"}
    curve = [(one.step, one.value) for one in best.metrics if one.key == "validation_loss"]
    assert [step for step, _ in curve] == list(range(1, 10))
    assert min(value for _, value in curve) == pytest.approx(tuned.ranked()[0].value)
    times = [one.timestamp for one in best.metrics]
    assert times == sorted(times)
    assert best.files.keys() == {"trial-1.toml", "weights.npz"}
    assert best.tags["tuner.version"] == "COMPLETE after 9"
    trial = tuned.trials()[WINNER]
    assert trial.datetime_start is not None
    assert best.start == int(1000 * trial.datetime_start.timestamp())


def test_a_second_export_writes_what_is_new_and_mends_what_was_cut_off(
    tuned: TunedStudy, mlflow: FakeMlflow
) -> None:
    mlflow.fails_at = "trial-2"
    with pytest.raises(TunerError, match="What was written so far stays") as failed:
        export_to_mlflow(tuned, "http://user:secret@mlflow/x")
    assert str(failed.value).startswith("--mlflow http://mlflow/x: the server is away: ")
    assert "secret" not in str(failed.value)
    mlflow.fails_at = None
    written = export_to_mlflow(tuned, "x")
    assert (written.written, written.replaced, written.unchanged) == (2, 1, 2)
    before = mlflow.named()
    written = export_to_mlflow(tuned, "x")
    assert (written.written, written.replaced, written.unchanged) == (0, 0, 5)
    assert mlflow.named() == before


def test_a_trial_that_went_on_is_written_anew(tmp_path: Path, mlflow: FakeMlflow) -> None:
    with storage_in(tmp_path) as storage:
        tuned = finished_study(storage, tmp_path, trials=9)
        trial = tuned.study.ask()
        trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
        export_to_mlflow(tuned, "x")
        name = f"trial-{trial.number}"
        assert (mlflow.named()[name].status, mlflow.named()[name].end) == ("RUNNING", None)
        tuned.study.tell(trial, 0.5)
        written = export_to_mlflow(tuned, "x")
        assert (written.replaced, written.unchanged) == (1, 5)
        assert mlflow.named()[name].status == "FINISHED"


def test_a_deleted_experiment_is_told_of(tuned: TunedStudy, mlflow: FakeMlflow) -> None:
    mlflow.create_experiment("demo")
    mlflow.experiments["demo"].lifecycle_stage = "deleted"
    with pytest.raises(TunerError, match="restore --experiment-id 7"):
        export_to_mlflow(tuned, "x")


def test_without_mlflow_its_extra_is_named(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SetupError, match=r"tuner\[mlflow\]'`"):
        export_to_mlflow(tuned, "x")


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_the_real_mlflow_takes_it_once(
    tuned: TunedStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert export_to_mlflow(tuned, uri).written == 5
    assert export_to_mlflow(tuned, uri).unchanged == 5
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("demo").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert len(runs) == 5
    best = runs["trial-1"]
    assert best.data.params == {"learning_rate": "0.01"}
    history = client.get_metric_history(best.info.run_id, "validation_loss")
    assert sorted(one.step for one in history) == list(range(1, 10))
    listed = {one.path for one in client.list_artifacts(best.info.run_id)}
    assert listed == {"trial-1.toml", "weights.npz"}


# --- TensorBoard ---


def records(file: Path) -> Iterator[bytes]:
    """The records of an event file: length, checksum, content, checksum."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def test_tensorboard_gets_a_folder_for_each_trial_and_one_file_in_it(
    tuned: TunedStudy, tmp_path: Path
) -> None:
    for _ in range(2):
        runs, _ = export_to_tensorboard(tuned, tmp_path)
        assert runs == 5
    folders = sorted((tmp_path / "demo").iterdir())
    assert [one.name for one in folders] == [f"trial-000{number}" for number in range(5)]
    (file,) = folders[WINNER].iterdir()
    written = b"".join(records(file))
    assert written.count(b"\n\x0fvalidation_loss") == 9  # tags, and not the study file
    assert b"as_trial = 1" in written


def test_the_verb_writes_for_trackers_and_nothing_else(
    tuned: TunedStudy, mlflow: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = ["--storage", tuned.storage.url, "--artifacts", str(tuned.artifacts.folder.parent)]
    shown = CliRunner().invoke(app, ["export", "demo", "--mlflow", "x", *where])
    assert shown.stdout == "MLflow, experiment demo: 5 new runs, 0 replaced, 0 unchanged.\n"
    assert list(tmp_path.iterdir()) == []
    both = ["--mlflow", "x", "--json", "--trial", "1", *where]
    document = json.loads(CliRunner().invoke(app, ["export", "demo", *both]).stdout)
    assert document["mlflow"]["unchanged"] == 5
    assert document["configs"][0]["trial"] == 1
