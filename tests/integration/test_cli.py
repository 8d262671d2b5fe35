"""The command line as a user has it: real processes, real training, tiny data."""

from __future__ import annotations

import contextlib
import csv
import gzip
import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import TypeVar

import optuna
import pytest
from folders import ROOT
from hooks import webhook
from optuna.trial import FrozenTrial, TrialState, create_trial
from typer.testing import CliRunner
from waiting import wait_until

from tuner.cli.main import app, main
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import StorageMissingError, TunerError
from tuner.search.attributes import AGAIN_KEY, ERROR_KEY, RESUMED_KEY, curve_of
from tuner.search.study import list_names, load
from tuner.search.tuned_study import FINISHED
from tuner.storage.storage import Storage

T = TypeVar("T")
TINY = """
name = "tiny"
trials = 3
[data]
source = "tiny.csv"
max_length = 200
[training]
max_epochs = 3
[hyperband]
[space]
embedding_dim = 4
blocks = 1
filters = { choices = [4, 8] }
pool_size = 4
units = 8
learning_rate = { low = 1e-3, high = 1e-2, log = true }
batch_size = 16
"""


def tuner(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tuner", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    assert "Traceback" not in done.stderr, done.stderr
    return done


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A `tuner` in a process group of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuner", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a study file, and a CSV of 200 proteins."""
    folder = tmp_path_factory.mktemp("lab")
    sequences, labels = synthetic_sequences()
    with (folder / "tiny.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "label"])
        writer.writerows(list(zip(sequences, labels, strict=True))[:200])
    (folder / "tiny.toml").write_text(TINY)
    return folder


@pytest.fixture
def fresh(folder: Path, tmp_path: Path) -> Path:
    """The same before anything was launched in it, whatever ran in `folder` by now."""
    for name in ("tiny.csv", "tiny.toml"):
        shutil.copy(folder / name, tmp_path)
    return tmp_path


def in_storage(folder: Path, look: Callable[[Storage], T]) -> T:
    with Storage(f"sqlite:///{folder}/runs/tuner.db") as storage:
        return look(storage)


def queued_studies(storage: Storage) -> tuple[int, ...]:
    return storage.queue.study_ids()


def trials_with_epochs(folder: Path, study: str) -> int:
    """Trials of which the storage holds an epoch; 0 where there is no study yet."""
    try:
        with Storage(f"sqlite:///{folder}/runs/tuner.db", create=False) as storage:
            trials = optuna.load_study(study_name=study, storage=storage.optuna).trials
    except (KeyError, StorageMissingError):
        return 0
    return sum(bool(trial.intermediate_values) for trial in trials)


def wait_for_epochs(folder: Path, study: str, trials: int, process: subprocess.Popen[str]) -> None:
    """Waits until this number of trials have trained an epoch, and so have a checkpoint."""
    wait_until(lambda: trials_with_epochs(folder, study) >= trials, seconds=120, alive=[process])


@pytest.fixture(scope="module")
def launched(folder: Path) -> dict:
    tuner(folder, "launch", "tiny.toml", "--detach")  # queued first: no service may run it again
    done = tuner(folder, "launch", "tiny.toml", "--workers", "1", "--json")
    return json.loads(done.stdout)


def test_a_launch_ends_with_exactly_its_budget(launched: dict, folder: Path) -> None:
    assert launched["study"] == "tiny"
    assert launched["state"] == "finished"
    assert launched["budget"] == 3
    assert launched["trials"]["COMPLETE"] + launched["trials"]["PRUNED"] == 3
    assert launched["epochs"]["spent"] + launched["epochs"]["saved"] == 9
    assert in_storage(folder, queued_studies) == ()
    assert set(launched["best"]["sampled"]) == {"block1.filters", "learning_rate"}


def test_a_second_launch_shows_the_finished_study(launched: dict, folder: Path) -> None:
    done = tuner(folder, "launch", "tiny.toml", "--export", "best")
    assert "finished" in done.stdout
    assert len(list((folder / "best").glob("*.toml"))) == 1
    shown = json.loads(tuner(folder, "status", "tiny", "--json").stdout)
    more = {"ensemble": launched["ensemble"], "confirmation": None}
    assert {**shown, **more} == launched


def test_a_launch_ends_with_a_network_to_predict_with(launched: dict, folder: Path) -> None:
    done = tuner(folder, "launch", "tiny.toml", "--export", "best")
    (bundle,) = (path.parent for path in (folder / "best").glob("*/bundle.json"))
    assert f"Trained network: best/{bundle.name}" in done.stdout
    described = json.loads((bundle / "bundle.json").read_text())
    ensemble = launched["ensemble"]
    if ensemble is not None and ensemble["is_better"]:
        assert described["trials"] == ensemble["trials"]
    else:
        assert described["trials"] == [launched["best"]["trial"]]


@pytest.mark.parametrize("form", ["toml", "json", "yaml"])
def test_every_exported_format_passes_check(launched: dict, folder: Path, form: str) -> None:
    tuner(folder, "export", "tiny", "--format", form, "-o", f"out.{form}")
    document = json.loads(tuner(folder, "check", f"out.{form}", "--json").stdout)
    assert document["valid"]
    assert document["trials"] == 1


def curves(folder: Path, study: str) -> list[list[tuple[float, ...]]]:
    """What each epoch of each trial brought, but for the seconds that it took."""

    def look(storage: Storage) -> list[list[tuple[float, ...]]]:
        trials = load(storage, study, artifacts_root=folder).trials()
        return [
            [astuple(replace(result, seconds=0.0)) for result in curve_of(trial)]
            for trial in trials
        ]

    return in_storage(folder, look)


def test_the_line_on_a_trial_s_page_trains_the_same_network_again(
    launched: dict, folder: Path
) -> None:
    number = launched["best"]["trial"]

    def the_line(storage: Storage) -> str:
        return load(storage, "tiny", artifacts_root=folder).trials()[number].user_attrs[AGAIN_KEY]

    # Pasted into a shell, where `tuner` is on the path.
    script = f'tuner() {{ "{sys.executable}" -m tuner "$@"; }}\n{in_storage(folder, the_line)}'
    subprocess.run(
        ["sh", "-c", script], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
        timeout=170,
    )  # fmt: skip
    again = json.loads(tuner(folder, "status", f"tiny-trial-{number}", "--json").stdout)
    assert again["state"] == "finished"
    assert again["best"]["validation_loss"] == launched["best"]["validation_loss"]
    assert curves(folder, again["study"]) == [curves(folder, "tiny")[number]]


def test_an_export_brings_every_trial(launched: dict, folder: Path) -> None:
    tuner(folder, "export", "tiny", "-o", "winner.toml", "--trials", "all.csv")
    with (folder / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    exported = json.loads(tuner(folder, "export", "tiny", "--json").stdout)["configs"][0]
    assert exported["rank"] == 1
    assert exported["provenance"]["study"] == "tiny"
    assert exported["config"]["blocks"][0]["filters"] == exported["sampled"]["block1.filters"]


# --- bundles and predictions ---

PROTEINS = ">p1 a protein\nMKVLAAGIVG\nLLLAAC\n>p2\nMKX\n>p1\nWWWW\n"


@pytest.fixture(scope="module")
def bundle(launched: dict, folder: Path) -> Path:
    done = tuner(folder, "export", "tiny", "--model", "-o", "bundle")
    assert done.stdout.endswith("Next: tuner predict bundle PROTEINS.fasta\n")
    return folder / "bundle"


def test_a_bundle_predicts_what_its_study_does(bundle: Path, folder: Path) -> None:
    (folder / "proteins.fasta").write_text(PROTEINS)
    done = tuner(folder, "predict", "bundle", "proteins.fasta")
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["id"] for row in rows] == ["p1", "p2", "p1"]
    assert [row["flags"] for row in rows] == [
        "shorter_than_trained",
        "shorter_than_trained;unknown_residues:X_at_3",
        "shorter_than_trained;duplicate_id",
    ]
    assert 0 < float(rows[0]["probability"]) < 1
    assert rows[1]["probability"] == ""
    assert done.stderr.startswith("3 sequences, ")
    tuner(folder, "predict", "tiny", "proteins.fasta", "-o", "out.csv")
    assert (folder / "out.csv").read_text() == done.stdout


def test_an_ensemble_is_one_bundle(bundle: Path, folder: Path) -> None:
    done = tuner(folder, "export", "tiny", "--ensemble", "5", "-o", "several.zip", "--json")
    (described,) = json.loads(done.stdout)["bundles"]
    assert described["path"] == "several.zip"
    assert described["validation"]["cross_fitted"]["halvings"] == 20
    # A table from stdin, and a packed file.
    (folder / "proteins.csv.gz").write_bytes(gzip.compress(b"id,sequence\nx,MKVLAAG\n"))
    done = subprocess.run(
        [sys.executable, "-m", "tuner", "predict", "several.zip", "-", "proteins.csv.gz",
         "--format", "jsonl"],
        input="id\tsequence\ny\tWWWWW\n",
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
    )  # fmt: skip
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["y", "x"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("predict", "bundle", "proteins.fasta", "--strict", "-o", "no.csv"), 1,
         "proteins.fasta:4: record 'p2' cannot be predicted (shorter_than_trained;unknown"),
        (("predict", "bundle", "none.fasta", "-o", "no.csv"), 1, "none.fasta: cannot be read"),
        (("predict", "bundle", "tiny.toml", "-o", "no.csv"), 1, "no column 'sequence'"),
        (("predict", "bundle", "-", "-"), 2, "name it once"),
        (("predict", "bundle", "tiny.csv", "-o", "tiny.csv"), 2, "is one of the inputs"),
        (("predict", "bundle", "tiny.csv", "-o", "bundle"), 1, "bundle: cannot be written"),
        (("predict", "nobody", "proteins.fasta"), 1, "holds no study 'nobody'"),
        (("predict", "no/bundle", "proteins.fasta"), 1, "there is no such bundle"),
        (("predict", "tiny.csv", "proteins.fasta"), 1, "cannot be read as a bundle"),
        (("export", "tiny", "--model", "-o", "."), 1, "is not empty and not a bundle"),
        (("export", "tiny", "--model", "--format", "yaml"), 2, "--format onnx needs --model"),
        (("export", "tiny", "--format", "onnx"), 2, "--format onnx needs --model"),
        (("export", "tiny", "--ensemble", "3", "--top", "2"), 2, "chooses its networks itself"),
        (("export", "tiny", "--model", "--top", "2", "-o", "two.zip"), 2, "is one bundle"),
        (("export", "tiny", "--model", "--trial", "77"), 1, "has no trial 77"),
    ],
)  # fmt: skip
def test_a_mistake_about_a_bundle_is_one_clear_message(
    bundle: Path,
    folder: Path,
    arguments: tuple[str, ...],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "proteins.fasta").write_text(PROTEINS)
    before = sorted(folder.iterdir())
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (code, "")
    assert words in " ".join(said.err.replace("│", "").split())
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_prediction_leaves_no_half_file(
    bundle: Path, folder: Path, which: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner", "predict", "bundle", "-", "-o", "half.csv"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run in the background, a shell may have them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"".join(b">p%d\nMKVLAAG\n" % at for at in range(20_000)))
        process.stdin.flush()
    wait_until(lambda: list(folder.glob(".*.new")), seconds=120, alive=[process])
    process.send_signal(which)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not list(folder.glob(".*.new"))
    assert not (folder / "half.csv").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")
@pytest.mark.parametrize("arguments", [("check", "--schema"), ("status",), ("--version",)])
def test_an_output_that_takes_nothing_is_told_of_in_a_line(
    launched: dict, folder: Path, arguments: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tuner", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=170,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "the output: No space left on device. --debug shows where that happened."
    ]


def test_a_launch_that_could_not_export_at_its_end_does_not_begin(folder: Path) -> None:
    arguments = ("launch", "tiny.toml", "--name", "unwritable", "--export", "/proc/tuner")
    done = tuner(folder, *arguments, check=False)
    assert done.returncode == 1
    assert "/proc/tuner: cannot be written" in done.stderr
    assert tuner(folder, "status", "unwritable", check=False).returncode == 1


def test_kill_9_of_the_coordinator_costs_nothing_and_leaves_no_process(folder: Path) -> None:
    arguments = ("launch", "tiny.toml", "--name", "killed", "--workers", "2", "--trials", "2",
                 "--set", "training.max_epochs=60", "--set", "training.patience=60",
                 "--set", "hyperband.min_epochs=40")  # fmt: skip
    process = start(folder, *arguments)
    wait_for_epochs(folder, "killed", 2, process)
    process.kill()
    process.communicate()
    assert_all_end(process.pid)
    before = json.loads(tuner(folder, "status", "killed", "--json").stdout)
    assert before["state"] == "stopped"
    assert before["trials"]["RUNNING"] == 2
    after = json.loads(tuner(folder, *arguments, "--json").stdout)
    assert after["state"] == "finished"
    assert after["trials"]["COMPLETE"] + after["trials"]["PRUNED"] == 2
    assert after["trials"]["RUNNING"] == 0
    assert after["resumed_trials"] == 2


def test_ctrl_c_stops_gracefully_says_how_to_resume_and_leaves_no_process(folder: Path) -> None:
    arguments = ("launch", "tiny.toml", "--name", "stopped", "--workers", "2",
                 "--set", "training.max_epochs=2000", "--set", "training.patience=2000",
                 "--set", "hyperband.min_epochs=1500")  # fmt: skip
    process = start(folder, *arguments)
    wait_for_epochs(folder, "stopped", 2, process)
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to the workers, too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopping: running trials save a checkpoint" in output
    assert "The same command resumes the study" in output
    assert "Traceback" not in output
    assert_all_end(process.pid)
    after = json.loads(tuner(folder, "status", "stopped", "--json").stdout)
    assert after["state"] == "stopped"
    checkpoints = list((folder / "runs" / "artifacts").glob("stopped-*/checkpoints/*.npz"))
    assert len(checkpoints) == after["trials"]["RUNNING"] == 2


def test_tuner_stop_ends_a_launch_and_a_second_launch_is_refused(folder: Path) -> None:
    arguments = ("launch", "tiny.toml", "--name", "asked", "--workers", "1",
                 "--set", "training.max_epochs=2000", "--set", "training.patience=2000",
                 "--set", "hyperband.min_epochs=1500")  # fmt: skip
    with webhook() as hook:
        process = start(folder, *arguments, "--notify", hook.url)
        wait_for_epochs(folder, "asked", 1, process)
        second = tuner(folder, *arguments, "--notify", hook.url, check=False)
        assert second.returncode == 1
        assert "is being run by process" in second.stderr
        assert "Asked asked to stop" in tuner(folder, "stop", "asked").stdout
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Stopped (stopped); nothing is lost" in output
    (told,) = hook.posted
    assert (told["event"], told["study"], told["state"]) == ("stopped", "asked", "stopped")


REFUSED = {
    "fewer trials": ["--trials", "5"],
    "the file's budget, after a raised one": [],
    "more trials": ["--trials", "60"],
    "a stop rule": ["--trials", "30", "--set", "stop.patience=1"],
    "fewer trials, queued": ["--trials", "5", "--detach"],
    "more trials, queued": ["--trials", "60", "--detach"],
    "a stop rule, queued": ["--trials", "30", "--set", "stop.patience=1", "--detach"],
    "fewer trials than are finished": ["--trials", "1"],
}


@pytest.mark.parametrize("more", REFUSED.values(), ids=REFUSED.keys())
def test_a_launch_that_is_refused_changes_nothing_of_the_study_that_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.chdir(folder)
    url = f"sqlite:///{tmp_path}/tuner.db"
    launch = ["launch", "tiny.toml", "--storage", url, "--artifacts", str(tmp_path)]
    assert CliRunner().invoke(app, [*launch, "--trials", "30", "--detach"]).exit_code == 0
    with Storage(url) as running:
        tuned = load(running, "tiny", artifacts_root=tmp_path)
        tuned.study.add_trial(create_trial(state=TrialState.PRUNED))
        running.queue.remove(tuned.id)
        running.lease.take(tuned.id)
        before = tuned.study.user_attrs
        refused = CliRunner().invoke(app, [*launch, *more])
        assert isinstance(refused.exception, TunerError)
        assert "is being run by process" in str(refused.exception)
        assert running.lease.heartbeat() is False  # it takes in what others change
        assert tuned.study.user_attrs == before
        assert running.queue.study_ids() == ()


def test_rows_that_another_study_keeps_sealed_are_told_loudly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    url = f"sqlite:///{tmp_path}/tuner.db"
    where = ["--storage", url, "--artifacts", str(tmp_path)]
    run = CliRunner().invoke
    fewer = ["--set", "data.split.test=0.05", "--set", "data.split.validation=0.15"]
    check = ["check", "tiny.toml", "--set", "name=second", "--json", *fewer]
    alone = json.loads(run(app, [*check, *where]).stdout)["warnings"]
    assert not any("sealed" in warning for warning in alone)
    assert not (tmp_path / "tuner.db").exists()
    assert run(app, ["launch", "tiny.toml", "--detach", *where]).exit_code == 0
    told = json.loads(run(app, [*check, *where]).stdout)["warnings"]
    words = "this study has 10 in its validation split and 10 in its test split"
    assert words in told[-1]
    launched = run(app, ["launch", "tiny.toml", "--name", "second", "--detach", *fewer, *where])
    assert "!" * 78 in launched.stderr
    assert words in launched.stderr.replace("\n", " ")
    # A storage that cannot be looked at leaves the study file as valid as it is.
    (tmp_path / "tuner.db").write_text("my thesis " * 200)
    unreadable = run(app, [*check, *where])
    assert json.loads(unreadable.stdout)["valid"] is True
    assert "Other studies could not be looked at" in unreadable.stderr


def test_a_launch_that_reaches_no_cluster_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tuner.cluster.connection.CONNECT_SECONDS", 0.1)
    url = f"sqlite:///{tmp_path}/tuner.db"
    launch = ["launch", "tiny.toml", "--storage", url, "--artifacts", str(tmp_path)]
    assert CliRunner().invoke(app, [*launch, "--trials", "30", "--detach"]).exit_code == 0
    away = [*launch, "--trials", "5", "--cluster", "tcp://127.0.0.1:1"]
    refused = CliRunner().invoke(app, away)
    assert isinstance(refused.exception, TunerError)
    with Storage(url) as storage:
        assert load(storage, "tiny", artifacts_root=tmp_path).budget == 30


def test_the_service_goes_on_after_a_restart_and_takes_turns_on_one_worker(folder: Path) -> None:
    budgets = {"first": 3, "second": 2}
    for name, trials in budgets.items():
        arguments = ("launch", "tiny.toml", "--name", name, "--trials", str(trials), "--detach")
        queued = json.loads(tuner(folder, *arguments, "--json").stdout)
        assert (queued["state"], queued["budget"]) == ("queued", trials)
    assert "Study second is queued already" in tuner(folder, *arguments).stdout

    def finished() -> dict[str, int]:
        def count(storage: Storage) -> dict[str, int]:
            tuned = [load(storage, name, artifacts_root=folder) for name in budgets]
            return {one.name: len(one.trials(*FINISHED)) for one in tuned}

        return in_storage(folder, count)

    def serve(until: Callable[[], bool]) -> str:
        """Runs the service until then; what it said."""
        process = start(folder, "serve", "--workers", "1", "--port", "0")
        assert process.stdout is not None
        said = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        assert address, said
        wait_until(until, seconds=120, pause=0.2, alive=[process])
        probe = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=30)
        probe.request("GET", "/healthz")
        assert probe.getresponse().read() == b"ok\n"
        probe.close()
        process.send_signal(signal.SIGTERM)
        said += process.communicate(timeout=60)[0]
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert_all_end(process.pid)
        return said

    said = serve(lambda: any(finished().values()))
    assert "The service ended; queued studies wait for the next one." in said
    assert finished() != budgets
    assert "queued" in tuner(folder, "status").stdout
    said = serve(lambda: finished() == budgets and not in_storage(folder, queued_studies))
    assert "Study first: finished, 3 of 3 trials" in said
    assert "Study second: finished, 2 of 2 trials" in said
    for document in json.loads(tuner(folder, "status", "--json").stdout):
        if document["study"] in budgets:
            assert document["state"] == "finished"
            assert document["trials"]["RUNNING"] == 0
            assert document["error"] is None
    assert "Study second is finished: 2 of 2" in tuner(folder, *arguments).stdout


def test_kill_9_of_the_service_costs_nothing_and_the_next_one_goes_on(folder: Path) -> None:
    arguments = ("launch", "tiny.toml", "--name", "served", "--trials", "2", "--detach",
                 "--set", "training.max_epochs=60", "--set", "training.patience=60",
                 "--set", "hyperband.min_epochs=40")  # fmt: skip
    tuner(folder, *arguments)

    def trials() -> list[FrozenTrial]:
        def read(storage: Storage) -> list[FrozenTrial]:
            return list(load(storage, "served", artifacts_root=folder).trials())

        return in_storage(folder, read)

    def count(query: str) -> int:
        # A look that costs next to nothing: the trial must still be running after it.
        database = sqlite3.connect(folder / "runs" / "tuner.db", timeout=30)
        with contextlib.closing(database):
            return database.execute(
                f"{query} JOIN studies USING (study_id) WHERE study_name = 'served'"
            ).fetchone()[0]

    def epochs() -> int:
        return count("SELECT count(*) FROM trial_intermediate_values JOIN trials USING (trial_id)")

    def finished() -> int:
        return count("SELECT sum(state IN ('COMPLETE', 'PRUNED')) FROM trials")

    def serve(until: Callable[[], bool]) -> subprocess.Popen[str]:
        process = start(folder, "serve", "--workers", "1", "--port", "0")
        wait_until(until, seconds=150, alive=[process])
        return process

    first = serve(lambda: epochs() >= 3)
    first.kill()
    first.communicate()
    assert_all_end(first.pid)
    before = trials()
    assert TrialState.RUNNING in [trial.state for trial in before]
    assert in_storage(folder, queued_studies)
    second = serve(lambda: finished() == 2 and not in_storage(folder, queued_studies))
    second.send_signal(signal.SIGTERM)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert "Traceback" not in said
    assert_all_end(second.pid)
    after = trials()
    assert [trial.state in FINISHED for trial in after] == [True, True]
    assert [trial.number for trial in after if trial.user_attrs.get(RESUMED_KEY)] == [
        trial.number for trial in before if trial.state == TrialState.RUNNING
    ]
    for trial, known in zip(after, before, strict=False):
        assert [result.epoch for result in curve_of(trial)] == list(range(1, trial.last_step + 1))
        assert known.params == trial.params
        assert known.intermediate_values.items() <= trial.intermediate_values.items()
    assert not list((folder / "runs" / "artifacts").glob("served-*/checkpoints/*"))


def test_a_queued_study_can_be_stopped_and_deleted(folder: Path) -> None:
    arguments = ("launch", "tiny.toml", "--name", "waiting", "--detach")
    tuner(folder, *arguments)
    assert "Took waiting out of the queue" in tuner(folder, "stop", "waiting").stdout

    def fail(storage: Storage) -> None:
        study = load(storage, "waiting", artifacts_root=folder).study
        study.set_user_attr(ERROR_KEY, "10 trials in a row failed")

    number = in_storage(folder, lambda one: load(one, "waiting", artifacts_root=folder).id)
    in_storage(folder, fail)
    assert "10 trials in a row failed" in tuner(folder, "status", "waiting").stdout
    again = json.loads(tuner(folder, *arguments, "--json").stdout)
    assert (again["state"], again["error"]) == ("queued", None)
    assert (
        "Its training and validation rows stay"
        in tuner(folder, "delete", "waiting", "--yes").stdout
    )
    assert number not in in_storage(folder, queued_studies)


def test_a_service_whose_port_is_taken_says_so_and_leaves_nothing_running(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(folder, "serve", "--port", str(port))
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"Port {port} on 127.0.0.1 is taken" in said
    assert_all_end(process.pid)


def test_users_are_made_listed_and_removed_and_no_password_is_an_argument(folder: Path) -> None:
    def users(*arguments: str, typed: str = "") -> str:
        command = [sys.executable, "-m", "tuner", "dashboard", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TUNER_USERS": "lab/users.json"}
        done = subprocess.run(
            command, cwd=folder, env=environment, input=typed, text=True, capture_output=True,
            check=True,
        )  # fmt: skip
        return done.stdout

    typed = "correct horse battery\n"
    added = users("add-user", "ada", "--role", "editor", "--password-file", "-", typed=typed)
    assert added == "Added ada, editor, in lab/users.json.\n"
    assert users("add-user", "vic", "--password-file", "-", typed=typed).startswith("Added vic, v")
    assert users("users") == "ada\teditor\nvic\tviewer\n"
    users("remove-user", "ada")
    assert json.loads(users("users", "--json")) == {"vic": "viewer"}
    assert (folder / "lab" / "users.json").stat().st_mode & 0o777 == 0o600
    assert "--password " not in users("add-user", "--help")


def test_changes_through_the_dashboard_are_listed(tmp_path: Path, folder: Path) -> None:
    with Storage(f"sqlite:///{tmp_path}/tuner.db") as storage:
        entry = storage.audit.record(who="ada", address="192.0.2.1", action="POST /x")
        storage.audit.complete(entry, status=303, detail="launched tiny")
        storage.audit.record(who="vic", address="192.0.2.2", action="POST /y")
    where = ("--storage", f"sqlite:///{tmp_path}/tuner.db")
    lines = tuner(folder, "dashboard", "log", *where).stdout.splitlines()
    assert lines[0].endswith("vic (192.0.2.2)  POST /y  never answered  ")
    assert lines[1].endswith("ada (192.0.2.1)  POST /x  303  launched tiny")
    documents = json.loads(tuner(folder, "dashboard", "log", *where, "--json").stdout)
    assert documents[1]["status"] == 303


def assert_all_end(group: int) -> None:
    """No worker outlives its coordinator by more than the seconds that a process takes to end."""
    wait_until(
        lambda: not group_members(group),
        lambda: f"{group_members(group)} outlived their coordinator",
        pause=0.2,
    )


def group_members(group: int) -> list[int]:
    import psutil

    members = []
    for process in psutil.process_iter():
        try:
            helper = "resource_tracker" in " ".join(process.cmdline())
            if os.getpgid(process.pid) == group and process.status() != "zombie" and not helper:
                members.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return members


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("launch", "none.toml"), 1, "none.toml: there is no such file"),
        (("launch", "."), 1, "is a folder"),
        (("launch", "tiny.toml", "--set", "trials=0"), 1, "--set trials: must be at least 1"),
        (("launch", "tiny.toml", "--set", "data.split.sed=1"), 1, 'did you mean "seed"'),
        (("launch", "tiny.toml", "--trials", "0"), 2, "--trials"),
        (("launch", "tiny.toml", "--workers", "0"), 2, "--workers"),
        (("worker", "--cluster", "tcp://127.0.0.1:1", "--workers", "²"), 2, "1 to 9999"),
        (("worker", "--cluster", "tcp://127.0.0.1:1", "--workers", "9" * 5000), 2, "1 to 9999"),
        (("launch", "[/y].toml"), 1, "[/y].toml: there is no such file"),
        (("launch", "tiny.toml", "--name", "a/b"), 1, "must not contain /"),
        (("launch", "tiny.toml", "--set", 'data.source="no.csv"'), 1, "no.csv"),
        (("launch", "tiny.toml", "--storage", "tuner.db"), 1, "no database URL"),
        (("launch", "tiny.toml", "--storage", "sqlite:///tiny.csv"), 1, "not a database"),
        (("launch", "tiny.toml", "--artifacts", "tiny.csv"), 1, "tiny.csv"),
        (("status", "nobody"), 1, "holds no study: there is no such file"),
        (("stop", "nobody"), 1, "holds no study: there is no such file"),
        (("export", "nobody"), 1, "holds no study: there is no such file"),
        (("report", "nobody"), 1, "holds no study: there is no such file"),
        (("delete", "nobody", "--yes"), 1, "holds no study: there is no such file"),
        (("dashboard", "--host", "0.0.0.0"), 1, "0.0.0.0"),
        (("serve", "--host", "0.0.0.0"), 1, "add-user NAME"),
        (("serve", "--users", "none.json"), 1, "no users file none.json"),
        (("dashboard", "add-user", "a b", "--password-file", "tiny.toml"), 1, "not a user name"),
        (("dashboard", "add-user", "ada"), 1, "--password-file FILE; - is stdin"),
        (("launch", "tiny.toml", "--detach", "--workers", "2"), 2, "--workers"),
        (("launch", "tiny.toml", "--detach", "--notify", "https://a.b"), 2, "--notify"),
        (("launch", "tiny.toml", "--notify", "a.b/c"), 1, "--notify does not hold a URL"),
        (("dashboard", "log"), 1, "holds no study: there is no such file"),
        (("status", "--storage", "sqlite://runs/tuner.db"), 1, "after three slashes"),
        (("launch", "tiny.toml", "--storage", "sqlite://runs/tuner.db"), 1, "after three slashes"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_a_mistake_of_the_user_is_one_clear_message(
    fresh: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    before = sorted(fresh.rglob("*"))
    done = tuner(fresh, *arguments, check=False)
    assert done.returncode == code
    assert words in done.stderr.replace("\n", " ")
    if arguments[0] not in ("launch", "serve"):
        assert sorted(fresh.rglob("*")) == before


@pytest.mark.parametrize("missing", ["tensorflow", "keras"])
@pytest.mark.parametrize(
    "arguments", [("launch", "tiny.toml"), ("serve",), ("worker", "--cluster", "tcp://127.0.0.1:1")]
)
def test_who_is_to_train_without_tensorflow_ends_before_anything_is_made(
    fresh: Path,
    arguments: tuple[str, ...],
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(fresh)
    monkeypatch.setitem(sys.modules, missing, None)  # to whoever looks for it, it is not installed
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments])
    before = sorted(fresh.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert f"{missing} cannot be found here" in said
    assert "pip install 'protein-tuner[cpu]'" in said
    assert "pip install 'protein-tuner[gpu]'" in said
    assert sorted(fresh.rglob("*")) == before


@pytest.mark.parametrize("where", [("--detach",), ("--cluster", "tcp://127.0.0.1:1")])
def test_who_lets_others_train_needs_no_tensorflow(
    fresh: Path, where: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fresh)
    monkeypatch.setattr("tuner.cluster.connection.CONNECT_SECONDS", 0.1)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    done = CliRunner().invoke(app, ["launch", "tiny.toml", *where])
    assert done.exception is None or "No Dask scheduler answers" in str(done.exception)
    with Storage(f"sqlite:///{fresh}/runs/tuner.db", create=False) as storage:
        assert list_names(storage) == ["tiny"]


def test_check_reports_every_mistake_with_its_line(folder: Path) -> None:
    text = TINY.replace("units", "unit").replace("blocks = 1", "blocks = 0")
    (folder / "bad.toml").write_text(text)
    done = tuner(folder, "check", "bad.toml", "--json", check=False)
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert document["valid"] is False
    assert [(error["key"], error["line"]) for error in document["errors"]] == [
        ("space.blocks", 12),
        ("space.unit", 15),
    ]


def test_check_tells_brackets_rungs_parameters_and_data(folder: Path) -> None:
    done = tuner(folder, "check", "tiny.toml", "--json")
    document = json.loads(done.stdout)
    assert [warning.split(":")[0] for warning in document["warnings"]] == [
        "only 20 validation rows",
        "only 20 test rows",
    ]
    assert "Warning: only 20 test rows: an accuracy measured on them has" in done.stderr
    assert document["brackets"] == [[1], []]
    assert document["trials_of_brackets"] == [2, 1]
    assert document["rungs"] == [1]
    assert document["max_epochs"] == 3
    assert document["trials"] == 3
    # 21 x 4 embedding; 5 x 4 x f + f convolution; f x 8 + 8 dense; 8 + 1 output.
    smallest, largest = 84 + 84 + 40 + 9, 84 + 168 + 72 + 9
    count = document["parameter_count"]
    assert (count["min"], count["max"], count["sampled"]) == (smallest, largest, 1000)
    assert count["median"] in (smallest, largest)
    assert document["data"]["rows"] == {"train": 160, "validation": 20, "test": 20}
    assert document["data"]["synthetic"] is False


def test_markup_of_the_terminal_in_names_and_paths_stays_text(folder: Path) -> None:
    (folder / "x[").mkdir()
    (folder / "x[/y]:smile:.csv").write_bytes((folder / "tiny.csv").read_bytes())
    done = tuner(folder, "check", "tiny.toml", "--set", "name=run [bold]x",
                 "--set", 'data.source="x[/y]:smile:.csv"')  # fmt: skip
    assert re.search(r"^study +run \[bold\]x,", done.stdout, re.MULTILINE)
    assert re.search(r"^data +x\[/y\]:smile:\.csv,", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_output_cannot_show_is_escaped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    name = "\U0001f600"
    text = tuner(folder, "check", "tiny.toml", "--set", f'name="{name}"').stdout
    assert f"study       {name if 'utf' in encoding else ascii(name)[1:-1]}," in text


def test_the_terminal_is_made_in_one_place() -> None:
    calls = [
        (path.relative_to(ROOT).as_posix(), line.strip())
        for path in sorted((ROOT / "tuner").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bConsole\(|\brich\.print\b|from rich import print", line)
    ]
    assert [path for path, _ in calls] == ["tuner/cli/terminal.py"], calls


def test_check_warns_loudly_of_dna(folder: Path) -> None:
    letters = str.maketrans("01", "AC")
    rows = [f"{f'{number:b}'.translate(letters) * 3},{number % 2}" for number in range(32, 64)]
    (folder / "dna.csv").write_text("\n".join(["sequence,label", *rows]))
    done = tuner(folder, "check", "tiny.toml", "--set", 'data.source="dna.csv"')
    before, warning, after, *_ = done.stderr.splitlines()
    assert before == after == "!" * 78
    assert warning.startswith("DNA, NOT PROTEINS? 32 of 32 sequences have only the letters ACGTUN")


def test_the_json_schema_accepts_the_shipped_study_files() -> None:
    import tomllib

    import jsonschema

    schema = json.loads(tuner(ROOT, "check", "--schema").stdout)
    for path in sorted((ROOT / "studies").glob("*.toml")):
        jsonschema.validate(tomllib.loads(path.read_text()), schema)


PROBE = "import sys, {module}; print(sorted({{'tensorflow', 'keras'}} & set(sys.modules)))"
QUIET_VERBS = [("--help",), ("check", "tiny.toml"), ("status",), ("export", "tiny", "-o", "x.toml")]


def loaded(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("verb", QUIET_VERBS)
def test_verbs_that_train_nothing_do_not_load_tensorflow(
    launched: dict, folder: Path, verb: tuple[str, ...]
) -> None:
    code = (
        "import sys, tuner.cli.main\n"
        f"sys.argv = ['tuner', *{verb!r}]\n"
        "try: tuner.cli.main.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    assert loaded(folder, code) == "[]"


def test_the_probe_for_tensorflow_can_find_it(folder: Path) -> None:
    assert loaded(folder, PROBE.format(module="tuner.network.model")) == "['keras', 'tensorflow']"
    assert loaded(folder, PROBE.format(module="tuner.cluster.trainings")) == "[]"
