"""Real worker processes over Dask, with trainings that cost nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import dask
import psutil
import pytest
from clusters import assert_memory_is_kept
from distributed import Client, Security
from fakes import (
    FakeRun,
    Notes,
    assert_whole,
    epoch_result,
    loss_of,
    make_study,
    refuse_writes,
    small_job,
    small_spec,
)
from optuna.trial import TrialState
from waiting import wait_until

from tuner.cluster.connection import Connection, local_connection
from tuner.cluster.messages import Left, Orders, Started, TrainingOutcome, to_wire
from tuner.cluster.training_task import _Permits
from tuner.cluster.trainings import Cluster
from tuner.coordination.coordinator import Coordinator
from tuner.coordination.study_trainings import StudyTrainings
from tuner.errors import (
    ClusterError,
    LeaseLostError,
    SetupError,
    TrainingPausedError,
    TrialEndedError,
    WorkerLeftError,
    WorkerLostError,
)
from tuner.search.attributes import NOTE_KEY, RESUMED_FROM_KEY, RESUMED_KEY, WORKER_KEY, curve_of
from tuner.search.tuned_study import TunedStudy


@pytest.fixture(scope="module")
def local() -> Iterator[Connection]:
    with local_connection(2, say=print) as connection:
        yield connection


@contextmanager
def cluster_of(connection: Connection, tuned: TunedStudy, open_run=FakeRun) -> Iterator[Cluster]:
    with Cluster(
        connection,
        StudyTrainings(tuned),
        development_file=Path("none.npz"),
        threads=1,
        open_run=open_run,
    ) as cluster:
        yield cluster
    tuned.storage.close()


def test_a_study_runs_on_workers_to_its_budget(tmp_path: Path, local: Connection) -> None:
    tuned = make_study(tmp_path, small_spec(trials=20))
    with cluster_of(local, tuned) as cluster:
        assert cluster.slots() == 2
        Coordinator(tuned, cluster, Notes()).run()
        assert_whole(tuned, 20)
        best = tuned.ranked()[0]
        assert tuned.artifacts.weights(best.number).read_bytes() == b"weights"
        processes = {epoch.seconds for trial in tuned.trials() for epoch in curve_of(trial)}
        assert len(processes) == 2
        assert os.getpid() not in processes
        for trial in tuned.trials():
            process = int(curve_of(trial)[-1].seconds)
            assert trial.user_attrs[WORKER_KEY] == f"{socket.gethostname()}, process {process}"
            assert RESUMED_FROM_KEY not in trial.user_attrs


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")
def test_a_training_process_keeps_the_memory_that_a_step_frees(local: Connection) -> None:
    assert_memory_is_kept(local)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_budgets_are_exact_with_any_number_of_worker_processes(
    tmp_path: Path, workers: int
) -> None:
    with local_connection(workers, say=print) as connection:
        wait_until(lambda: connection.slots() == workers)
        for budget in (1, workers + 1, 11):
            tuned = make_study(tmp_path / str(budget), small_spec(trials=budget, seed=2))
            notes = Notes()
            with cluster_of(connection, tuned) as cluster:
                assert Coordinator(tuned, cluster, notes).run() == "finished"
                assert_whole(tuned, budget)
                assert sorted(trial.number for trial in notes.ended) == list(range(budget))
                asked = [
                    one.trial for one in tuned.storage.decisions.of(tuned.id) if one.kind == "ask"
                ]
                assert sorted(asked) == list(range(budget))


def test_a_pruned_training_stops_on_its_worker(tmp_path: Path, local: Connection) -> None:
    tuned = make_study(tmp_path, small_spec(seed=20))
    with cluster_of(local, tuned) as cluster:
        epochs = cluster.train(small_job(tuned.record.spec, rungs=(1, 3)))
        assert next(epochs).epoch == 1
        # The verdict of epoch 1 is awaited: nothing is trained ahead of it.
        time.sleep(0.3)
        epochs.close()
        again = cluster.train(small_job(tuned.record.spec, rungs=(1, 3)))
        assert [epoch.epoch for epoch in again] == list(range(1, 10))


def test_a_worker_waits_at_a_rung_for_the_verdict(tmp_path: Path, local: Connection) -> None:
    tuned = make_study(tmp_path, small_spec(seed=1))
    with cluster_of(local, tuned) as cluster:
        epochs = cluster.train(small_job(tuned.record.spec, rungs=(3,)))
        assert next(epochs).epoch == 1
        (attempt,) = cluster._attempts._living.values()
        time.sleep(0.5)  # a hundred epochs' time
        assert attempt._inbox.qsize() == 2
        epochs.close()


class UnfitRun(FakeRun):
    """Of an installation that cannot train."""

    def __init__(self, task) -> None:
        raise SetupError("TensorFlow cannot be imported here.")


def test_workers_that_cannot_train_leave_and_no_trial_fails(tmp_path: Path) -> None:
    told: list[str] = []
    tuned = make_study(tmp_path, small_spec(trials=20))
    with local_connection(2, say=told.append) as connection:
        wait_until(lambda: connection.slots() == 2)
        with cluster_of(connection, tuned, UnfitRun) as cluster:
            with pytest.raises(ClusterError, match=r"can train: TensorFlow cannot be imported"):
                Coordinator(tuned, cluster, Notes()).run()
            assert {trial.state for trial in tuned.trials()} == {TrialState.RUNNING}
    line = "A worker cannot train and has left: TensorFlow cannot be imported here."
    assert told.count(line) == 1


def test_the_trial_of_a_worker_that_cannot_train_is_trained_by_another(tmp_path: Path) -> None:
    mark = tmp_path / "unfit"

    class SometimesUnfitRun(FakeRun):
        def __init__(self, task) -> None:
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                raise SetupError("it has no Keras")
            super().__init__(task)

    tuned = make_study(tmp_path, small_spec(trials=4))
    with local_connection(2, say=print) as connection:
        wait_until(lambda: connection.slots() == 2)
        with cluster_of(connection, tuned, SometimesUnfitRun) as cluster:
            Coordinator(tuned, cluster, Notes()).run()
            assert_whole(tuned, 4)
            wait_until(lambda: connection.slots() == 1)


class DivergingRun(FakeRun):
    def epochs(self):
        yield next(super().epochs())
        raise TrialEndedError("diverged", "epoch 2, training loss nan")


def test_how_a_trial_ended_on_its_worker_reaches_the_study(
    tmp_path: Path, local: Connection
) -> None:
    tuned = make_study(tmp_path, small_spec(trials=1))
    with cluster_of(local, tuned, DivergingRun) as cluster:
        Coordinator(tuned, cluster, Notes()).run()
        (trial,) = tuned.trials()
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["ended_detail"] == "epoch 2, training loss nan"


class QuickRun(FakeRun):
    def __init__(self, task) -> None:
        super().__init__(replace(task, job=replace(task.job, seed=0)))


def test_a_paused_study_resumes_from_its_checkpoints(tmp_path: Path, local: Connection) -> None:
    # Epochs of 100 ms: no trial can end by itself before the pause has reached its worker.
    tuned = make_study(
        tmp_path, small_spec(trials=4, seed=100, hyperband=None, training={"max_epochs": 300})
    )
    settings = {"development_file": Path("none.npz"), "threads": 1}
    with contextlib.closing(tuned.storage):
        begun: set[int] = set()
        coordinator: list[Coordinator] = []

        def stop(trial: int, result: object) -> None:
            begun.add(trial)
            if len(begun) == 2:
                coordinator[0].stop("interrupted")

        with Cluster(local, StudyTrainings(tuned), open_run=FakeRun, **settings) as cluster:
            coordinator.append(Coordinator(tuned, cluster, Notes(stop)))
            coordinator[0].run()
        running = tuned.trials(TrialState.RUNNING)
        assert {trial.number for trial in running} == begun
        assert all(tuned.artifacts.checkpoint(trial.number).exists() for trial in running)
        with Cluster(local, StudyTrainings(tuned), open_run=QuickRun, **settings) as cluster:
            Coordinator(tuned, cluster, Notes()).run()
        assert_whole(tuned, 4)
        resumed = [trial for trial in tuned.trials() if trial.user_attrs.get(RESUMED_KEY)]
        assert {trial.number for trial in resumed} == {trial.number for trial in running}
        for trial in resumed:
            after = trial.user_attrs[RESUMED_FROM_KEY]
            assert after >= 1
            note = trial.user_attrs[NOTE_KEY]
            assert note.endswith(f"the last time from its checkpoint after epoch {after}.")
        assert not any((tuned.artifacts.folder / "checkpoints").iterdir())


def test_kill_9_of_workers_loses_no_trial_and_doubles_none(
    tmp_path: Path, local: Connection
) -> None:
    tuned = make_study(tmp_path, small_spec(trials=10, seed=60, hyperband=None))
    killed: list[int] = []

    def kill(trial: int, result) -> None:
        # The worker itself said that it trained this epoch: it is one of this test's own.
        if trial in (1, 4, 5) and result.epoch == 2 and trial not in killed:
            killed.append(trial)
            os.kill(int(result.seconds), signal.SIGKILL)

    notes = Notes(kill)
    with cluster_of(local, tuned) as cluster:
        Coordinator(tuned, cluster, notes).run()
        assert_whole(tuned, 10)
        resumed = {trial.number for trial in tuned.trials() if trial.user_attrs.get(RESUMED_KEY)}
    assert sorted(killed) == [1, 4, 5]
    assert resumed >= {1, 4, 5}
    assert any("its worker died; it resumes under its number" in line for line in notes.said)


def test_sigterm_of_a_local_worker_gives_its_trial_back(tmp_path: Path, local: Connection) -> None:
    tuned = make_study(tmp_path, small_spec(trials=2, seed=60, hyperband=None))
    signalled: list[int] = []

    def leave(trial: int, result) -> None:
        if trial == 1 and result.epoch == 3 and not signalled:
            signalled.append(int(result.seconds))
            os.kill(int(result.seconds), signal.SIGTERM)

    notes = Notes(leave)
    with cluster_of(local, tuned) as cluster:
        Coordinator(tuned, cluster, notes).run()
        assert_whole(tuned, 2)
        (trial,) = [trial for trial in tuned.trials() if trial.number == 1]
        assert "workers_lost" not in trial.user_attrs  # no fault of the trial's
        assert trial.user_attrs[RESUMED_KEY] == 1
        # The checkpoint is that of the last epoch: those before it are not trained again.
        trained_by = [int(epoch.seconds) for epoch in curve_of(trial)]
        assert trained_by[:3] == signalled * 3
        assert signalled[0] not in trained_by[4:]
    assert notes.said == ["Trial 1: its worker left and gave it back; it resumes under its number."]


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[: len(whole) // 2]])
def test_a_damaged_checkpoint_costs_epochs_and_never_its_trial(
    tmp_path: Path, local: Connection, monkeypatch: pytest.MonkeyPatch, damage
) -> None:
    told: list[str] = []
    monkeypatch.setattr(local, "say", told.append)
    tuned = make_study(tmp_path, small_spec(trials=1, seed=60, hyperband=None))
    coordinator: list[Coordinator] = []

    def stop(trial: int, result) -> None:
        if result.epoch == 3:
            coordinator[0].stop("interrupted")

    with cluster_of(local, tuned) as cluster:
        coordinator.append(Coordinator(tuned, cluster, Notes(stop)))
        coordinator[0].run()
        checkpoint = tuned.artifacts.checkpoint(0)
        checkpoint.write_bytes(damage(checkpoint.read_bytes()))
        reported = tuned.trials(TrialState.RUNNING)[0].intermediate_values
        assert len(reported) >= 3
        cluster._pausing.clear()
        Coordinator(tuned, cluster, Notes()).run()
        assert_whole(tuned, 1)
        (trial,) = tuned.trials()
        assert trial.state == TrialState.COMPLETE
        assert reported.items() <= trial.intermediate_values.items()
        assert not checkpoint.exists()
    (line,) = [line for line in told if "checkpoint" in line]
    assert line.startswith("Trial 0 of small: its checkpoint cannot be used and was removed (JSON")


REFUSALS = [
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
    PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    OSError(errno.EIO, os.strerror(errno.EIO)),
    OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
    MemoryError(),
]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_a_checkpoint_that_cannot_be_opened_is_waited_for_and_stays(
    tmp_path: Path, local: Connection, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    told: list[str] = []
    monkeypatch.setattr(local, "say", told.append)
    monkeypatch.setattr("tuner.cluster.trial_files._RETRY_SECONDS", 0.2)
    tuned = make_study(tmp_path, small_spec(trials=1, hyperband=None))
    config = tuned.record.spec.space.resolve({"blocks": 1, "learning_rate": 1e-3})
    rows = [asdict(epoch_result(loss_of(config, 0, epoch), epoch)) for epoch in (1, 2, 3)]
    checkpoint = tuned.artifacts.checkpoint(0)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text(json.dumps(rows))
    read_bytes, refused = Path.read_bytes, []

    def refuse(path: Path) -> bytes:
        if path == checkpoint and len(refused) < 3:
            refused.append(path)
            assert path.exists()
            raise error
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with cluster_of(local, tuned) as cluster:
        epochs = cluster.train(small_job(tuned.record.spec, rungs=()))
        trained_by = [int(epoch.seconds) for epoch in epochs]
    assert len(refused) == 3
    assert trained_by[:3] == [0, 0, 0]  # those of the checkpoint
    assert 0 not in trained_by[3:]
    (line,) = [line for line in told if "cannot be read" in line]
    assert "Trial 0 of small: " in line
    assert not [line for line in told if "was removed" in line]


def test_a_stop_does_not_wait_for_a_checkpoint_that_cannot_be_opened(
    tmp_path: Path, local: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(local, "say", told.append)
    tuned = make_study(tmp_path, small_spec(trials=1, hyperband=None))
    checkpoint = tuned.artifacts.checkpoint(0)
    checkpoint.mkdir(parents=True)  # as it is, it will never be read
    with cluster_of(local, tuned) as cluster:
        coordinator = Coordinator(tuned, cluster, Notes())
        stopper = threading.Thread(
            target=lambda: wait_until(lambda: bool(told)) and coordinator.stop("interrupted")
        )
        stopper.start()
        assert coordinator.run() == "interrupted"
        stopper.join()
        (trial,) = tuned.trials()
        assert trial.state == TrialState.RUNNING
    assert checkpoint.exists()


def test_a_worker_whose_system_refuses_files_fails_no_trial(
    tmp_path: Path, local: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.cluster.trial_files._RETRY_SECONDS", 0.2)
    mark = tmp_path / "refused"

    class RefusedRun(FakeRun):
        def __init__(self, task) -> None:
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            super().__init__(task)

    tuned = make_study(tmp_path, small_spec(trials=2))
    notes = Notes()
    with cluster_of(local, tuned, RefusedRun) as cluster:
        Coordinator(tuned, cluster, notes).run()
        assert_whole(tuned, 2)
    (line,) = notes.said
    assert "its worker was refused by its system (Too many open files); it" in line


@pytest.fixture
def said(local: Connection, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    # Workers that are missed for a while are another story, of a machine that is busy.
    monkeypatch.setattr(local, "say", lambda line: "written" in line and lines.append(line))
    return lines


def test_a_stop_does_not_wait_for_a_full_disk(
    tmp_path: Path, local: Connection, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = refuse_writes(monkeypatch, "weights", times=1000)
    tuned = make_study(tmp_path, small_spec(trials=1))
    with cluster_of(local, tuned) as cluster:
        coordinator = Coordinator(tuned, cluster, Notes())
        stopper = threading.Thread(
            target=lambda: wait_until(lambda: bool(attempts)) and coordinator.stop("interrupted")
        )
        stopper.start()
        assert coordinator.run() == "interrupted"
        stopper.join()
        (trial,) = tuned.trials()
        assert trial.state == TrialState.RUNNING
        monkeypatch.undo()
        cluster._pausing.clear()
        Coordinator(tuned, cluster, Notes()).run()
        assert_whole(tuned, 1)


def test_a_checkpoint_that_finds_the_disk_full_is_skipped(
    tmp_path: Path, local: Connection, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = refuse_writes(monkeypatch, "checkpoints", times=1000)
    tuned = make_study(tmp_path, small_spec(trials=1, seed=60, hyperband=None))
    gone: list[int] = []

    def leave(trial: int, result) -> None:
        if result.epoch in (2, 4) and len(gone) < result.epoch / 2:
            gone.append(result.epoch)
            os.kill(int(result.seconds), signal.SIGTERM)

    with cluster_of(local, tuned) as cluster:
        Coordinator(tuned, cluster, Notes(leave)).run()
        assert_whole(tuned, 1)
    assert len(attempts) == 2
    assert len(said) == 1  # not once for each


def test_a_training_that_dask_started_again_by_itself_is_given_up(
    tmp_path: Path, local: Connection
) -> None:
    tuned = make_study(tmp_path, small_spec(seed=100))
    with cluster_of(local, tuned) as cluster:
        epochs = cluster.train(small_job(tuned.record.spec, rungs=(9,)))
        next(epochs)
        (attempt,) = cluster._attempts._living
        cluster._hear((0.0, to_wire(Started(attempt=attempt))))
        with pytest.raises(WorkerLostError) as lost:
            list(epochs)
        assert not isinstance(lost.value, WorkerLeftError)


def test_an_attempt_that_was_given_up_is_not_believed(tmp_path: Path, local: Connection) -> None:
    tuned = make_study(tmp_path, small_spec(seed=20))
    with cluster_of(local, tuned) as cluster:
        epochs = cluster.train(small_job(tuned.record.spec, rungs=(1,)))
        next(epochs)
        (old,) = cluster._attempts._living
        epochs.close()
        again = cluster.train(small_job(tuned.record.spec, rungs=(1,)))
        next(again)
        left = Left(attempt=old, reason="asked", checkpoint=b"of the old one")
        cluster._hear((0.0, to_wire(left)))
        assert len(list(again)) == 8
        # The rung that the new one survived brought a checkpoint of its own.
        assert tuned.artifacts.checkpoint(0).read_bytes() != b"of the old one"


def worker_processes() -> set[int]:
    found = set()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def test_a_worker_that_is_slow_to_start_again_is_not_given_up() -> None:
    before = worker_processes()
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "500ms"}),
        local_connection(1, say=lambda _: None) as connection,
    ):
        wait_until(lambda: connection.slots() == 1)
        (first,) = worker_processes() - before
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: worker_processes() - before - {first})
        (second,) = worker_processes() - before - {first}
        os.kill(second, signal.SIGSTOP)
        wait_until(lambda: connection.slots() == 0)
        time.sleep(1.5)
        os.kill(second, signal.SIGCONT)
        wait_until(lambda: connection.slots() == 1)


# --- who can reach the scheduler of this machine ---


def ports_of_ours() -> set[int]:
    """Where this process and its worker processes listen."""
    processes = [psutil.Process(), *map(psutil.Process, worker_processes())]
    return {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def first_words(port: int, context: ssl.SSLContext | None, question: bytes = b"") -> bytes:
    """What a server says first; nothing where it hangs up or refuses the certificate."""
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        try:
            if context is not None:
                one = stack.enter_context(context.wrap_socket(one))
            one.sendall(question)
            return one.recv(100)
        except (ssl.SSLError, ConnectionError):
            return b""


def with_certificate_of(security: Security | None) -> ssl.SSLContext:
    """A client that trusts every server, and shows this certificate."""
    if security is not None:
        context = security.get_connection_args("client")["ssl_context"]
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.fixture(scope="module")
def ports(local: Connection) -> set[int]:
    wait_until(lambda: local.slots() == 2)
    wait_until(lambda: len(ports_of_ours()) >= 5)  # scheduler, two nannies, two workers
    return ports_of_ours()


def test_every_port_of_a_local_cluster_asks_for_its_certificate(
    local: Connection, ports: set[int]
) -> None:
    own = with_certificate_of(local.client.security)
    assert all(first_words(port, own) for port in ports)  # the answer that others do not get
    for stranger in (None, Security.temporary()):
        context = with_certificate_of(stranger)
        assert {port: first_words(port, context) for port in ports} == dict.fromkeys(ports, b"")


@pytest.mark.parametrize("question", [b"GET /json/identity.json HTTP/1.0\r\n\r\n", b"\0" * 64])
def test_no_port_of_a_local_cluster_answers_in_the_clear(ports: set[int], question: bytes) -> None:
    answers = {port: first_words(port, None, question) for port in ports}
    # At most the alert of TLS (record type 21), and no word of HTTP's or Dask's.
    assert all(answer[:1] in (b"", b"\x15") for answer in answers.values()), answers


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
def test_a_dask_client_of_another_run_cannot_connect(local: Connection, scheme: str) -> None:
    address = local.client.scheduler.address
    assert address.startswith("tls://127.0.0.1:")
    other = None if scheme == "tcp" else Security.temporary()
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on who hangs up first
        Client(address.replace("tls", scheme), security=other, timeout=2, set_as_default=False)
    own = local.client.security
    with Client(address, security=own, timeout=30, set_as_default=False) as second:
        assert second.submit(abs, -1).result() == 1


def test_the_key_of_a_local_cluster_is_in_no_command_line_environment_or_file(
    local: Connection, ports: set[int]
) -> None:
    key = local.client.security.tls_worker_key
    assert "PRIVATE KEY" in key
    line = key.splitlines()[1]
    for process in map(psutil.Process, worker_processes()):
        assert line not in " ".join(process.cmdline())
        assert line not in str(process.environ())
    kept = Path(tempfile.gettempdir())
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert not [path for path in files if line.encode() in path.read_bytes()]
    assert line not in f"{local.client!r} {local.client.security!r} {local.client.cluster!r}"


@pytest.fixture
def permits(monkeypatch: pytest.MonkeyPatch) -> _Permits:
    class Deaf:
        def subscribe_topic(self, topic: str, handler: object) -> None:
            pass

    monkeypatch.setattr("tuner.cluster.training_task.get_client", Deaf)
    heard = _Permits("topic")
    heard.begin("attempt", 3)
    return heard


def wanted() -> bool:
    return False


def hear(permits: _Permits, attempts: dict[str, int], *, pause=False, complete=False) -> None:
    permits._hear((0.0, to_wire(Orders(pause=pause, attempts=attempts, complete=complete))))


def test_between_rungs_a_worker_runs_ahead(permits: _Permits) -> None:
    assert permits.wait("attempt", 2, wanted) == "go"
    threading.Timer(0.1, hear, (permits, {"attempt": 9})).start()
    assert permits.wait("attempt", 3, wanted) == "go"


def test_an_attempt_that_complete_orders_do_not_name_stops(permits: _Permits) -> None:
    hear(permits, {"another": 9})
    assert permits.wait("attempt", 1, wanted) == "go"
    hear(permits, {"another": 9}, complete=True)
    assert permits.wait("attempt", 1, wanted) == "stop"


def test_an_attempt_that_the_scheduler_forgot_stops_where_it_waits(permits: _Permits) -> None:
    asked: list[bool] = []

    def is_unwanted() -> bool:
        asked.append(len(asked) > 0)
        return asked[-1]

    assert permits.wait("attempt", 3, is_unwanted) == "stop"  # it would wait for its verdict


def test_a_worker_without_a_coordinator_saves_and_ends(
    permits: _Permits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.cluster.training_task._SILENCE_SECONDS", 0.2)
    assert permits.wait("attempt", 3, wanted) == "pause"


# --- files, and the lease that fences them ---


class NoConnection:
    """A connection to nothing: of a cluster whose files alone are looked at."""

    is_up = False

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def __getattr__(self, _name: str) -> object:
        return lambda *_: None


ENDINGS = {
    "paused": TrainingOutcome(ending="paused", curve=(), checkpoint=b"old"),
    "finished": TrainingOutcome(ending="finished", curve=(), best_weights=b"old"),
}


@pytest.mark.parametrize("outcome", ENDINGS.values(), ids=ENDINGS.keys())
def test_what_an_outcome_brings_is_not_kept_by_a_coordinator_that_was_replaced(
    tmp_path: Path, outcome: TrainingOutcome
) -> None:
    tuned = make_study(tmp_path)
    with cluster_of(NoConnection(), tuned) as cluster:
        tuned.storage.lease.take(tuned.id)
        tuned.storage.lease._certain_at -= 3600.0  # an hour passes
        tuned.storage._transactions.run(
            lambda c: c.exec_driver_sql("UPDATE tuner_lease SET token = 'another'")
        )
        with pytest.raises(LeaseLostError):
            cluster._conclude(outcome, 0)
    assert not tuned.artifacts.checkpoint(0).exists()
    assert not tuned.artifacts.weights(0).exists()


def test_what_an_outcome_brings_is_kept(tmp_path: Path) -> None:
    tuned = make_study(tmp_path)
    with cluster_of(NoConnection(), tuned) as cluster:
        tuned.storage.lease.take(tuned.id)
        with pytest.raises(WorkerLeftError, match="heard nothing"):
            cluster._conclude(ENDINGS["paused"], 0)
        cluster.pause()
        with pytest.raises(TrainingPausedError):
            cluster._conclude(ENDINGS["paused"], 0)
        cluster._conclude(ENDINGS["finished"], 0)
    assert tuned.artifacts.checkpoint(0).read_bytes() == b"old"
    assert tuned.artifacts.weights(0).read_bytes() == b"old"
