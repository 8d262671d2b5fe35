"""Whatever dies, a study ends with exactly its budget: real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drive import Plan
from fault_runs import (
    Launch,
    Tuner,
    assert_gone,
    assert_whole,
    open_trials,
    plan_for,
    resumed,
    scheduler,
    trained_by,
    worker,
)
from folders import TESTS
from ports import free_port
from postgres import Postgres
from proxy import Cut, Proxy

from tuner.artifacts import publish

MakePlan = Callable[..., Plan]

#: How long a database is away. The suite stays quick; benchmarks/faults.py takes 60 s.
AWAY_SECONDS = float(os.environ.get("PYTEST_TUNER_AWAY_SECONDS", "5"))

#: Trials of about a second, none of them pruned, for two workers.
LONG = {"trials": 6, "seed": 120, "hyperband": None}


@pytest.fixture(params=["sqlite", "postgresql"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> MakePlan:
    url = f"sqlite:///{tmp_path}/tuner.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").database()

    def make(**changes: object) -> Plan:
        return plan_for(url, tmp_path, **changes)

    return make


@pytest.fixture
def plan_of_sqlite(tmp_path: Path) -> MakePlan:
    """Where the database takes no part in the fault."""
    return lambda **changes: plan_for(f"sqlite:///{tmp_path}/tuner.db", tmp_path, **changes)


def test_kill_9_of_a_worker_in_every_phase(plan: MakePlan) -> None:
    """`kill -9` of workers: at a rung, before the first report, between reports, while a checkpoint
    of 64 MB travels."""
    phases = {
        "0": "at a rung",
        "1": "before the first report",
        "2": "between reports",
        "3": "while its checkpoint travels",
    }
    # The only rung comes after every hold of trials 1 to 3, and trial 0 is the first there: which
    # of them is pruned first does not depend on who is faster.
    spec = {"trials": 8, "seed": 20, "hyperband": {"min_epochs": 6, "eta": 3}}
    mine = plan(holds=phases, rung=6, checkpoint_seconds=0.0, spec=spec)
    killed: dict[int, int] = {}
    with Launch(mine) as launch:
        for pair in ((0, 1), (2, 3)):
            for trial in pair:
                killed[trial] = launch.held_worker(trial)
                os.kill(killed[trial], signal.SIGKILL)
                mine.go(trial).touch()
        said = launch.end()
        # "before it trained" where what the worker said last died with it.
        died = re.findall(
            r"its worker died( before it trained)?; it resumes under its number", said
        )
        assert len(died) >= 4, said
        assert "ending finished" in said
    trials = assert_whole(mine)
    assert resumed(trials) >= {0, 1, 2, 3}
    # Trial 2 had checkpoints: what its first worker trained was not trained again.
    first, *_, last = trained_by(trials[2])
    assert (first == killed[2], last == killed[2]) == (True, False)


def test_kill_9_of_the_coordinator(plan: MakePlan) -> None:
    """`kill -9` of the coordinator, then the same command again."""
    mine = plan(spec={"trials": 8, "seed": 100, "hyperband": None})
    with Launch(mine) as first:
        first.wait_for("epoch 2 4")
        first.kill()
        assert_gone(first.processes)
        left = open_trials(mine)
    with Launch(mine) as second:
        assert "resumes; it had" in second.end()
    assert 2 in left
    assert resumed(assert_whole(mine)) == left


def test_a_frozen_coordinator_that_was_replaced_does_no_harm(plan: MakePlan) -> None:
    """the coordinator frozen (SIGSTOP; on SQLite outside a transaction) until its lease lapsed,
    another one started, the first one continued."""
    mine = plan(lease_seconds=3.0, spec={"trials": 10, "seed": 150, "hyperband": None})
    with Launch(mine) as first:
        first.wait_for("epoch 1 4")
        freeze_between_transactions(first)
        time.sleep(mine.lease_seconds + 0.5)
        with Launch(mine) as second:
            seen = second.wait_for("epoch 2 4")
            first.thaw()
            said = first.end()
            assert "Another coordinator took this study over" in said
            assert first.process.returncode == 1
            assert_gone(first.processes)
            second.wait_for("epoch", after=seen)
            assert "ending finished" in second.end()
    assert_whole(mine)


def freeze_between_transactions(launch: Launch) -> None:
    """Freezes it where it holds no lock.

    SQLite has nobody who would take a lock from a frozen process: a second launch would wait for
    it, and say that the database is locked. PostgreSQL ends such a transaction after 15 s.
    """
    launch.freeze()
    while launch.plan.url.startswith("sqlite") and is_locked(launch.plan.url):
        launch.thaw()
        time.sleep(0.01)
        launch.freeze()


def is_locked(url: str) -> bool:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0, isolation_level=None)
    with contextlib.closing(connection):
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return True
    return False


def test_two_launches_at_once_run_the_study_once(plan: MakePlan) -> None:
    """two launches of the same study at the same moment."""
    mine = plan(spec={"trials": 6, "seed": 50})
    with Launch(mine) as one, Launch(mine) as two:
        said = sorted((one.end(), two.end()), key=lambda said: "ending finished" in said)
    assert "This study is being run by process" in said[0]
    assert "epoch" not in said[0]
    assert "ending finished" in said[1]
    assert_whole(mine)


def test_a_clock_that_jumps_an_hour(plan: MakePlan, tmp_path: Path) -> None:
    """the wall clock of Python (`time.time`, and SQLite's through it) an hour forward, two hours
    back, right again; meanwhile a second launch."""
    clock = tmp_path / "clock"
    set_clock(clock, 0)
    mine = plan(spec={"trials": 10, "seed": 150, "hyperband": None})
    jumping = {
        "PYTHONPATH": str(TESTS / "clock"),
        "PYTEST_TUNER_CLOCK": str(clock),
    }
    with Launch(mine, **jumping) as launch:
        launch.wait_for("epoch 1 4")
        set_clock(clock, 3600)
        launch.wait_for("epoch 3 4")
        with Launch(mine, **jumping) as second:
            assert "This study is being run by process" in second.end()
        set_clock(clock, -3600)
        launch.wait_for("ended", count=6)
        set_clock(clock, 0)
        assert "ending finished" in launch.end()
    assert not resumed(assert_whole(mine))


def set_clock(clock: Path, seconds_off: int) -> None:
    publish(clock, str(seconds_off).encode())  # it is read all the time


def test_a_full_disk_under_the_database_is_waited_for(plan_of_sqlite: MakePlan) -> None:
    """no room for the database (SQLite; a limit on the size of files, EFBIG), then room again."""
    mine = plan_of_sqlite(spec=LONG)
    with Launch(mine) as launch:
        launch.wait_for("epoch 1 4")
        fill_disk(launch, 1)
        launch.wait_for("The database does not answer")
        free_disk(launch)
        launch.wait_for("The database is back")
        assert "ending finished" in launch.end()
    assert not resumed(assert_whole(mine))


def test_a_full_disk_under_the_artifacts_is_waited_for(plan_of_sqlite: MakePlan) -> None:
    """no room for checkpoints and weights (a limit on the size of files, EFBIG), then room
    again."""
    mine = plan_of_sqlite(weights_bytes=8 << 20, checkpoint_seconds=0.3, spec=LONG)
    with Launch(mine) as launch:
        launch.wait_for("epoch 1 4")
        fill_disk(launch, 6 << 20)  # room enough for SQLite's own files
        launch.wait_for("cannot be written (File too large)")
        seen = launch.wait_for("epoch 1 9")
        time.sleep(1)
        assert not [line for line in launch.lines[seen:] if line.startswith("ended")]
        free_disk(launch)
        assert "ending finished" in launch.end()
    assert not resumed(assert_whole(mine))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("a disk that can be filled needs the right to mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_without_a_byte_left_is_waited_for(small_disk: Path) -> None:
    """a disk of 8 MB with the database (SQLite) and the artifacts filled to its last byte (ENOSPC),
    then room again."""
    mine = plan_for(
        f"sqlite:///{small_disk}/tuner.db", small_disk, checkpoint_seconds=0.3, spec=LONG
    )
    filler = small_disk / "filler"
    with Launch(mine) as launch:
        launch.wait_for("epoch 1 4")
        with pytest.raises(OSError, match="No space left"):
            take_all_room(filler)
        launch.wait_for("cannot be written (No space left on device)")
        launch.wait_for("The database does not answer")
        filler.unlink()
        launch.wait_for("The database is back")
        assert "ending finished" in launch.end()
    assert not resumed(assert_whole(mine))


def take_all_room(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def fill_disk(launch: Launch, most_bytes: int) -> None:
    """From now on no file of the coordinator's may grow beyond so many bytes."""
    limits = (most_bytes, resource.RLIM_INFINITY)
    resource.prlimit(launch.process.pid, resource.RLIMIT_FSIZE, limits)


def free_disk(launch: Launch) -> None:
    fill_disk(launch, resource.RLIM_INFINITY)


def test_sigterm_of_a_worker_gives_its_trial_back_and_sigint_is_not_its_business(
    plan_of_sqlite: MakePlan,
) -> None:
    """SIGTERM to a worker process, SIGINT to another."""
    mine = plan_of_sqlite(spec=LONG)
    with Launch(mine) as launch:
        launch.wait_for("epoch 1 4")
        os.kill(launch.worker_of(0), signal.SIGINT)
        left = launch.worker_of(1)
        os.kill(left, signal.SIGTERM)
        launch.wait_for("Trial 1: ")
        assert "ending finished" in launch.end()
        assert "Trial 0: " not in launch.said
    trials = assert_whole(mine)
    assert resumed(trials) == {1}
    # It saved before it left: nothing is trained again.
    by = trained_by(trials[1])
    assert by[:4] == [left] * 4
    assert by[-1] != left


def test_kill_9_of_the_scheduler(plan_of_sqlite: MakePlan) -> None:
    """`kill -9` of the Dask scheduler, a new one at its address."""
    port = free_port()
    mine = plan_of_sqlite(cluster=f"tcp://127.0.0.1:{port}", checkpoint_seconds=0.0, spec=LONG)
    with (
        scheduler(port) as first,
        worker(port) as one,
        worker(port) as two,
        Launch(mine) as launch,
    ):
        launch.wait_for("epoch 1 4")
        first.kill()
        launch.wait_for("The scheduler is unavailable; the study waits for it")
        with scheduler(port):
            launch.wait_for("The scheduler is back; trials resume from their last checkpoints")
            assert "ending finished" in launch.end()
            for each in (one, two):
                each.wait_for("Joined again")
                each.process.send_signal(signal.SIGTERM)
                assert "its trials were given back" in each.end()
    assert resumed(assert_whole(mine)) >= {0, 1}


def test_a_worker_that_was_cut_off_is_not_believed_when_it_comes_back(
    plan_of_sqlite: MakePlan,
) -> None:
    """the network between a worker and the scheduler: silent for a second, later cut; the worker
    trains on, and comes back."""
    port = free_port()
    mine = plan_of_sqlite(cluster=f"tcp://127.0.0.1:{port}", spec=LONG)
    with (
        scheduler(port),
        Proxy(port) as network,
        worker(port),
        worker(network.port) as remote,
        Launch(mine) as launch,
    ):
        launch.wait_for("epoch 1 4")
        # First a second in which packets are lost: what was said comes late, and counts.
        network.cut("blackhole")
        time.sleep(1)
        network.heal()
        launch.wait_for("epoch 3 2")
        network.cut("reset")
        launch.wait_for("it resumes under its number")
        network.heal()
        remote.wait_for("Joined again")
        assert "ending finished" in launch.end()
        trials = assert_whole(mine)
        (cut_off,) = resumed(trials)
        before, *_ = [line for line in launch.lines if line.startswith(f"epoch {cut_off} 1 ")]
        # Without a checkpoint it begins again, and no epoch of the first attempt is in its curve.
        assert int(before.split()[3]) not in trained_by(trials[cut_off])


# --- PostgreSQL goes away ---


def test_a_database_that_is_restarted_killed_and_stopped_in_the_middle_of_trials(
    postgres: Postgres, tmp_path: Path
) -> None:
    """PostgreSQL restarted, `kill -9` of all its processes, then stopped for a while."""
    mine = plan_for(postgres.database(), tmp_path, spec=LONG | {"trials": 16})
    with Launch(mine) as launch:
        seen = launch.wait_for("epoch 1 4")
        postgres.restart()
        seen = launch.wait_for("ended", after=seen)
        postgres.kill()
        postgres.start()
        seen = launch.wait_for("ended", after=seen)
        postgres.stop()
        time.sleep(AWAY_SECONDS)
        assert launch.process.poll() is None
        postgres.start()
        launch.wait_for("The database does not answer; waiting for it, nothing is lost", after=seen)
        launch.wait_for("The database is back after", after=seen)
        assert "ending finished" in launch.end()
    assert not resumed(assert_whole(mine))


@pytest.mark.parametrize("how", ["reset", "blackhole"])
def test_a_network_that_is_cut_between_coordinator_and_database(
    postgres: Postgres, tmp_path: Path, how: Cut
) -> None:
    """the network between coordinator and database cut for a while."""
    with Proxy(postgres.port) as network:
        url = postgres.database(port=network.port)
        mine = plan_for(url, tmp_path, silence_seconds=3.0, spec=LONG)
        with Launch(mine) as launch:
            seen = launch.wait_for("epoch 1 4")
            network.cut(how)
            time.sleep(AWAY_SECONDS)
            network.heal()
            launch.wait_for("The database is back after", after=seen)
            assert "ending finished" in launch.end()
        assert not resumed(assert_whole(mine))


def test_tuner_stop_while_the_database_is_away(postgres: Postgres, tmp_path: Path) -> None:
    """`tuner stop` while PostgreSQL is stopped, and when it is back; then the same launch again."""
    # It must not be finished before a second `tuner stop` has started, on a busy machine neither.
    mine = plan_for(postgres.database(), tmp_path, spec=LONG | {"trials": 30})
    with Launch(mine) as launch:
        launch.wait_for("epoch 1 4")
        postgres.stop()
        try:
            with Tuner("stop", "small", TUNER_STORAGE=mine.url) as stop:
                said = stop.end()
        finally:
            postgres.start()
        assert stop.process.returncode == 1
        assert "Connection refused" in said
        assert "Traceback" not in said
        assert secret_of(mine.url) not in said + launch.said
        with Tuner("stop", "small", TUNER_STORAGE=mine.url) as stop:
            assert "Asked small to stop" in stop.end()
        assert "ending stopped" in launch.end()
    with Launch(mine) as again:
        assert "ending finished" in again.end()
    assert_whole(mine)


def secret_of(url: str) -> str:
    return url.split(":")[2].split("@", maxsplit=1)[0]
