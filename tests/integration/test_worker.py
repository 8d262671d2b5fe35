"""`tuner worker` as a real process, and what it decides without one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from clusters import (
    DASK_WORKER,
    ROOT,
    SCHEDULER,
    STRANGERS,
    TUNER_WORKER,
    Program,
    assert_memory_is_kept,
    program,
    scheduler,
    stranger,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed.core import Server
from distributed.utils import get_ip
from fakes import FakeRun, Notes, assert_whole, make_study, small_job, small_spec
from ports import free_port
from waiting import wait_until

from tuner.cluster.connection import Connection, remote_connection
from tuner.cluster.gpus import Gpu, gpus_for, visible_gpus
from tuner.cluster.scheduler import TlsFiles, exposure, is_loopback, scheduler_address
from tuner.cluster.training_task import find_development_file
from tuner.cluster.trainings import Cluster
from tuner.cluster.worker import WorkerSettings, _environments
from tuner.coordination.coordinator import Coordinator
from tuner.coordination.study_trainings import StudyTrainings
from tuner.data.delivery import development_file
from tuner.errors import ClusterError, SetupError
from tuner.search.attributes import RESUMED_KEY, curve_of


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with scheduler() as address:
        yield address


@pytest.fixture
def connection(address: str) -> Iterator[Connection]:
    with remote_connection(address, say=print) as connection:
        wait_until(lambda: connection.slots() == 0)  # what the test before left is gone
        yield connection


class LongEpochRun(FakeRun):
    """A trial's second epoch takes a minute, unless the trial was taken up from a checkpoint."""

    def epochs(self):
        is_fresh = not self.history
        for result in super().epochs():
            yield result
            if result.epoch == 1 and is_fresh:
                time.sleep(60)


def signal_as_timeout_does(worker: Program) -> None:
    """First its child, then the whole group: worker and training processes hear it twice."""
    worker.signal(signal.SIGTERM)
    os.killpg(worker.process.pid, signal.SIGTERM)


LEAVING = {
    "timeout": ((*TUNER_WORKER, "{}"), signal_as_timeout_does, 0),
    "SIGTERM": ((*TUNER_WORKER, "{}"), lambda worker: worker.signal(signal.SIGTERM), 0),
    "Ctrl-C": ((*TUNER_WORKER, "{}"), Program.interrupt, 0),
    "lifetime": ((*TUNER_WORKER, "{}", "--lifetime", "8"), lambda worker: None, 0),
    "dask worker": ((*DASK_WORKER, "{}"), lambda worker: worker.signal(signal.SIGTERM), None),
}


@pytest.mark.parametrize("way", LEAVING)
def test_a_worker_that_leaves_in_the_middle_of_an_epoch_gives_its_trial_back(
    tmp_path: Path, address: str, connection: Connection, way: str
) -> None:
    command, leave, code = LEAVING[way]
    tuned = make_study(tmp_path, small_spec(trials=1, hyperband=None))
    said_at: list[float] = []

    class Clock(Notes):
        def say(self, message: str) -> None:
            super().say(message)
            said_at.append(time.monotonic())

    with program(*(part.format(address) for part in command)) as worker:
        connection.require_workers()
        left_at: list[float] = []

        def on_epoch(trial: int, result) -> None:
            if result.epoch == 1 and not left_at:
                leave(worker)
                left_at.append(time.monotonic())

        notes = Clock(on_epoch)
        cluster = Cluster(
            connection,
            StudyTrainings(tuned),
            development_file=tmp_path / "no",
            threads=1,
            open_run=LongEpochRun,
        )
        with cluster:
            coordinator = Coordinator(tuned, cluster, notes)
            running = threading.Thread(target=coordinator.run)
            running.start()
            wait_until(lambda: bool(said_at))
            assert notes.said == [
                "Trial 0: its worker left and gave it back; it resumes under its number."
            ]
            if way != "lifetime":
                assert said_at[0] - left_at[0] < 5  # seconds, of an epoch of sixty
            assert tuned.artifacts.checkpoint(0).exists()
            if code is not None:
                assert worker.wait() == code
                assert " INFO Worker ended (" in worker.says("given back")
            with program(*TUNER_WORKER, address):
                running.join(60)
        assert_whole(tuned, 1)
        (trial,) = tuned.trials()
        assert trial.user_attrs[RESUMED_KEY] == 1
        assert len({epoch.seconds for epoch in curve_of(trial)}) == 2  # processes
    tuned.storage.close()


def test_a_signal_that_comes_again_at_once_is_the_same_and_a_later_one_ends_the_worker(
    address: str, connection: Connection
) -> None:
    with program(*TUNER_WORKER, address) as worker:
        worker.says("Joined", timeout=60)
        frozen = training_process(worker)
        frozen.suspend()  # so that leaving takes its time
        worker.signal(signal.SIGTERM)
        time.sleep(0.1)
        worker.signal(signal.SIGTERM)
        time.sleep(0.9)
        assert worker.process.poll() is None
        worker.signal(signal.SIGTERM)
        assert worker.wait(2) == 128 + signal.SIGTERM
        assert worker.says("Ended at once")
        frozen.wait(5)


def test_a_signal_after_all_was_given_back_changes_nothing(address: str) -> None:
    with program(*TUNER_WORKER, address) as worker:
        worker.says("Joined", timeout=60)
        worker.signal(signal.SIGTERM)
        worker.says("Worker ended (SIGTERM)")
        while worker.process.poll() is None:
            worker.signal(signal.SIGTERM)
            time.sleep(0.001)
        assert worker.wait() == 0


def training_process(worker: Program) -> psutil.Process:
    """The one that Dask's nanny started."""
    below = psutil.Process(worker.process.pid).children(recursive=True)
    (found,) = [process for process in below if "spawn_main" in " ".join(process.cmdline())]
    return found


def test_a_worker_that_never_joined_does_not_say_that_it_gave_trials_back() -> None:
    with program(*TUNER_WORKER, f"tcp://127.0.0.1:{free_port()}") as worker:
        worker.says("this worker waits for it")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        ended = "Worker ended (SIGTERM); it had no scheduler, and trained nothing."
        assert worker.says("Worker ended").endswith(f" INFO {ended}")


@pytest.mark.parametrize("kind", ["silent", "hangs up"])
def test_a_worker_says_that_what_answers_is_not_a_scheduler(kind: str) -> None:
    with stranger(kind) as address, program(*TUNER_WORKER, address) as worker:
        line = worker.says("this worker waits for it", timeout=60)
        assert f"Something answers at {address}, but no Dask scheduler" in line
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_answers_and_is_not_a_scheduler_is_told(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.cluster.connection.CONNECT_SECONDS", 0.5)
    words = rf"Something answers at {{}}, but no Dask scheduler .* without TLS: {WHY[kind]}"
    with (
        stranger(kind) as address,
        pytest.raises(ClusterError, match=words.format(address)),
        remote_connection(address, say=print),
    ):
        pass


WHY = {
    "silent": "it accepted the connection, and did not answer within",
    "hangs up": ".*([Cc]losed|reset)",
    "mail server": "what it says is not Dask's protocol",
    "web server": "what it says is not Dask's protocol",
    "half a message": "it accepted the connection, and did not answer within",
}


def test_another_part_of_dask_is_not_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.cluster.connection.CONNECT_SECONDS", 5.0)
    started, is_over = threading.Event(), threading.Event()
    addresses: list[str] = []

    async def serve() -> None:
        async with Server({}) as server:
            await server.listen("tcp://127.0.0.1:0")
            addresses.append(server.address)
            started.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(30)
    try:
        with (
            pytest.raises(ClusterError, match="another part of it than a scheduler"),
            remote_connection(addresses[0], say=print),
        ):
            pass
    finally:
        is_over.set()
        thread.join()


def test_a_running_study_says_that_what_answers_is_not_its_scheduler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tuner.cluster.connection.CONNECT_SECONDS", 2.0)
    port = free_port()
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        with scheduler(port) as address:
            stack.enter_context(remote_connection(address, say=said.append))
        with stranger("silent", port):
            wait_until(lambda: bool(said), 60)
        assert f"(Something answers at {address}, but no Dask scheduler" in said[0]
        with scheduler(port):
            wait_until(lambda: "is back" in said[-1], 60)


@pytest.mark.parametrize("verb", ["launch", "serve"])
def test_every_verb_says_that_what_answers_is_not_a_scheduler(verb: str, tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text('name = "q"\ntrials = 1\n[data]\nsource = "synthetic"\n[space]\n')
    places = ("--storage", f"sqlite:///{tmp_path}/t.db", "--artifacts", str(tmp_path / "a"))
    what = (str(study),) if verb == "launch" else ("--port", "0")
    with (
        stranger("silent") as address,
        program("-m", "tuner", verb, *what, *places, "--cluster", address) as running,
    ):
        running.says(f"Something answers at {address}, but no Dask scheduler", timeout=90)
        assert running.wait() == 1


class HungryRun(FakeRun):
    """Its second epoch takes more memory than there is, unless it was taken up."""

    def epochs(self):
        is_fresh = not self.history
        for result in super().epochs():
            yield result
            if result.epoch == 1 and is_fresh:
                hoard = bytearray(600_000_000)
                time.sleep(30)
                del hoard


def test_a_worker_over_its_memory_limit_is_started_again_and_the_trial_is_to_blame(
    tmp_path: Path, address: str, connection: Connection
) -> None:
    tuned = make_study(tmp_path, small_spec(trials=1, hyperband=None))
    notes = Notes()
    with program(*TUNER_WORKER, address, "--memory-limit", "500MB") as worker:
        connection.require_workers()
        with Cluster(
            connection,
            StudyTrainings(tuned),
            development_file=tmp_path,
            threads=1,
            open_run=HungryRun,
        ) as cluster:
            Coordinator(tuned, cluster, notes).run()
        assert worker.process.poll() is None
        assert_whole(tuned, 1)
        assert notes.said == ["Trial 0: its worker ran out of memory; it resumes under its number."]
        # Five of these in one epoch would end the trial.
        assert tuned.trials()[0].user_attrs["workers_lost"] == 1
    tuned.storage.close()


class UnfitRun(FakeRun):
    """Of an installation that cannot train, where the worker's environment says so."""

    def __init__(self, task) -> None:
        if "TESTS_UNFIT" in os.environ:
            raise SetupError("TensorFlow cannot be imported here.")
        super().__init__(task)


def test_a_worker_that_cannot_train_ends_and_says_why(
    tmp_path: Path, address: str, connection: Connection
) -> None:
    tuned = make_study(tmp_path, small_spec(trials=2, hyperband=None))
    notes = Notes()
    unfit = (*TUNER_WORKER, address)
    with program(*unfit, environment={"TESTS_UNFIT": "1"}) as worker:
        connection.require_workers()
        with Cluster(
            connection,
            StudyTrainings(tuned),
            development_file=tmp_path,
            threads=1,
            open_run=UnfitRun,
        ) as cluster:
            coordinator = threading.Thread(target=Coordinator(tuned, cluster, notes).run)
            coordinator.start()
            worker.says("This worker cannot train: TensorFlow cannot be imported here.")
            assert worker.wait() == 1
            with program(*TUNER_WORKER, address):
                coordinator.join(timeout=60)
            assert not coordinator.is_alive()
        assert_whole(tuned, 2)
    assert "Trial 0: its worker cannot train and left; it resumes under its number." in notes.said
    tuned.storage.close()


class DataRun(FakeRun):
    def __init__(self, task) -> None:
        super().__init__(task)
        assert find_development_file(task).read_bytes() == b"rows"


def test_workers_join_die_and_fetch_data_over_an_external_scheduler(
    tmp_path: Path, address: str, connection: Connection
) -> None:
    """A second worker joins in the middle; a process of the first is killed."""
    spec = small_spec(trials=8, seed=150, hyperband=None)
    tuned = make_study(tmp_path, spec, development_sha256=hashlib.sha256(b"rows").hexdigest())
    rows = tmp_path / "rows.npz"
    rows.write_bytes(b"rows")
    cache = {"TUNER_CACHE": str(tmp_path / "cache")}
    killed: list[int] = []
    pids: set[int] = set()
    with program(*TUNER_WORKER, address, environment=cache) as first:
        connection.require_workers()
        if Path("/proc/self/environ").exists():
            assert_memory_is_kept(connection)
        with Cluster(
            connection, StudyTrainings(tuned), development_file=rows, threads=1, open_run=DataRun
        ) as cluster:
            rows.unlink()  # as if the workers were on another machine
            more: list[Program] = []

            def on_epoch(trial: int, result) -> None:
                pids.add(int(result.seconds))
                if not more:
                    more.append(Program(*TUNER_WORKER, address, environment=cache))
                if len(pids) == 2 and result.epoch == 3 and not killed:
                    killed.append(trial)
                    os.kill(int(result.seconds), signal.SIGKILL)

            notes = Notes(on_epoch)
            try:
                Coordinator(tuned, cluster, notes).run()
            finally:
                more[0].end()
        assert_whole(tuned, 8)
        assert len(pids) >= 2
        # Dask started the task again by itself; the trial went on as a new attempt.
        assert f"Trial {killed[0]}: its worker died; it resumes under its number." in notes.said
        (copy,) = (tmp_path / "cache" / "development").glob("*.npz")
        assert copy.read_bytes() == b"rows"
        assert first.process.poll() is None
    tuned.storage.close()


COORDINATOR = """
import sys
from pathlib import Path
from fakes import FakeRun, make_study, small_job, small_spec
from tuner.cluster.connection import remote_connection
from tuner.cluster.trainings import Cluster
from tuner.coordination.study_trainings import StudyTrainings

folder = Path(sys.argv[1])
tuned = make_study(folder, small_spec(seed=10))
with remote_connection(sys.argv[2], say=print) as connection:
    trained = StudyTrainings(tuned)
    cluster = Cluster(connection, trained, development_file=folder, threads=1, open_run=FakeRun)
    with cluster:
        epochs = cluster.train(small_job(tuned.record.spec, rungs=(1,)))
        next(epochs)
        print("waits at the rung", file=sys.stderr, flush=True)
        sys.stdin.read()
"""


def test_a_worker_whose_coordinator_was_killed_is_free_within_seconds(
    tmp_path: Path, address: str, connection: Connection
) -> None:
    with program(*TUNER_WORKER, address):
        connection.require_workers()
        with program("-c", COORDINATOR, str(tmp_path / "a"), address) as coordinator:
            coordinator.says("waits at the rung")
            coordinator.process.kill()
            coordinator.process.wait()
        tuned = make_study(tmp_path / "b", small_spec(seed=10))
        with Cluster(
            connection,
            StudyTrainings(tuned),
            development_file=tmp_path,
            threads=1,
            open_run=FakeRun,
        ) as cluster:
            started = time.monotonic()
            assert next(cluster.train(small_job(tuned.record.spec, rungs=(1,)))).epoch == 1
            assert time.monotonic() - started < 10  # seconds; silence alone would take sixty
        tuned.storage.close()


def test_a_killed_scheduler_is_found_again_at_its_address_and_at_another(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    tuned = make_study(tmp_path, small_spec(trials=4, seed=150, hyperband=None))
    said: list[str] = []
    with contextlib.ExitStack() as stack, program(*TUNER_WORKER, str(file)) as worker:
        worker.says("this worker waits for it")
        schedulers: list[Program] = []

        def start(port: int) -> None:
            arguments = (*SCHEDULER, "--port", str(port), "--scheduler-file", str(file))
            schedulers.append(stack.enter_context(program(*arguments)))

        port = free_port()
        start(port)
        worker.says("Joined tcp://")
        ports = {1: port, 2: free_port()}  # by the trial at which the scheduler is killed

        def on_epoch(trial: int, result) -> None:
            if result.epoch == 3 and trial in ports:
                schedulers[-1].process.kill()
                schedulers[-1].process.wait()
                threading.Thread(target=start, args=(ports.pop(trial),)).start()

        notes = Notes(on_epoch)
        with remote_connection(str(file), say=said.append) as connection:
            connection.require_workers()
            with Cluster(
                connection,
                StudyTrainings(tuned),
                development_file=tmp_path,
                threads=1,
                open_run=FakeRun,
            ) as cluster:
                Coordinator(tuned, cluster, notes).run()
        assert_whole(tuned, 4)
    tuned.storage.close()
    assert [line.split(";")[0] for line in said if "scheduler" in line] == [
        "The scheduler is unavailable",
        "The scheduler is back",
    ] * 2
    assert all("its scheduler dropped it" in line for line in notes.said)
    assert {int(line.split(":")[0].removeprefix("Trial ")) for line in notes.said} == {1, 2}
    assert sum("Joined again" in line for line in worker.lines) == 2


def test_tls_protects_a_cluster(tmp_path: Path) -> None:
    ca, cert, key = certificates(tmp_path)
    files = ("--tls-ca-file", ca, "--tls-cert", cert, "--tls-key", key)
    mine = ("--tls-ca", ca, "--tls-cert", cert, "--tls-key", key)
    tuned = make_study(tmp_path, small_spec(trials=2))
    with (
        scheduler(more=("--protocol", "tls", *files)) as address,
        program(*TUNER_WORKER, address, *mine) as worker,
    ):
        worker.says("Joined tls://")
        tls = TlsFiles(ca=Path(ca), cert=Path(cert), key=Path(key))
        with (
            remote_connection(address, tls=tls, say=print) as connection,
            Cluster(
                connection,
                StudyTrainings(tuned),
                development_file=tmp_path,
                threads=1,
                open_run=FakeRun,
            ) as cluster,
        ):
            connection.require_workers()
            Coordinator(tuned, cluster, Notes()).run()
        assert_whole(tuned, 2)
        plain = address.replace("tls://", "tcp://")
        with (
            pytest.raises(ClusterError, match=r"no Dask scheduler .* without TLS"),
            remote_connection(plain, say=print),
        ):
            pass
    tuned.storage.close()


def certificates(folder: Path) -> tuple[str, str, str]:
    """An authority, and a certificate for 127.0.0.1 with its key."""
    now = datetime.now(UTC)
    authority_key, own_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def signed(subject: str, public: object, authority: bool) -> bytes:
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("test authority"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    ca, cert, key = (folder / f"{part}.pem" for part in ("ca", "cert", "key"))
    ca.write_bytes(signed("test authority", authority_key.public_key(), True))
    cert.write_bytes(signed("test", own_key.public_key(), False))
    key.write_bytes(
        own_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(ca), str(cert), str(key)


# --- messages ---


JOIN_NOBODY = ("worker", "--cluster", "tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("launch", "x.toml", "--cluster", "tcp://127.0.0.1:1", "--workers", "2"), 2, "--workers"),
        (("launch", "x.toml", "--cluster", "tls://127.0.0.1:1"), 1, "--tls-ca, --tls-cert and"),
        (("worker", "--cluster", "file.json", "--tls-ca", "no.pem"), 1, "all three files"),
        (("worker", "--cluster", "tcp://127.0.0.1:1", "--workers", "none"), 2, "--workers"),
        ((*JOIN_NOBODY, "--memory-limit", "much"), 1, "for instance"),
        ((*JOIN_NOBODY, "--memory-limit=-5GB"), 1, "--memory-limit -5GB: a training process takes"),
        ((*JOIN_NOBODY, "--memory-limit", "0"), 1, "there is always a limit"),
        ((*JOIN_NOBODY, "--memory-limit", "5"), 1, "takes 100MB before"),
        ((*JOIN_NOBODY, "--host", "nosuchif"), 1, "--host nosuchif: neither an address"),
        ((*JOIN_NOBODY, "--host", "198.51.100.1"), 1, "network interfaces (lo"),
        ((*JOIN_NOBODY, "--host", ""), 1, "network interfaces (lo"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_message(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    (tmp_path / "x.toml").write_text('name = "x"\ntrials = 1\n[data]\nsource = "synthetic"\n')
    done = subprocess.run(
        [sys.executable, "-m", "tuner", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert words in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("cluster", "content", "words"),
    [
        ("http://host:1", None, "no address of a Dask scheduler"),
        ("tcp://", None, "no address of a Dask scheduler"),
        ("tcp://host:what", None, "no address of a Dask scheduler"),
        ("no.json", None, "no such scheduler file"),
        ("file.json", "half {", "is not JSON with an address"),
        ("file.json", "{}", "is not JSON with an address"),
        ("file.json", '{"address": 3}', "is not JSON with an address"),
        ("file.json", '{"address": "tls://host:1"}', r"tls://host:1 \(of file.json\) wants TLS"),
    ],
)
def test_what_is_no_scheduler_is_told_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cluster: str,
    content: str | None,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(cluster).write_text(content)
    with pytest.raises(ClusterError, match=words):
        scheduler_address(cluster)


def test_certificates_for_a_scheduler_without_tls_are_refused(tmp_path: Path) -> None:
    tls = TlsFiles(**dict.fromkeys(("ca", "cert", "key"), Path(__file__)))
    with pytest.raises(ClusterError, match="would protect nothing"):
        scheduler_address("tcp://host:1", tls)
    with pytest.raises(ClusterError, match=r"--tls-key .*no.pem: no such file"):
        TlsFiles(ca=Path(__file__), cert=Path(__file__), key=tmp_path / "no.pem")


def test_nobody_at_the_address_is_an_error_after_a_short_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tuner.cluster.connection.CONNECT_SECONDS", 0.3)
    with (
        pytest.raises(ClusterError, match=r"No Dask scheduler answers at tcp://127.0.0.1:1\."),
        remote_connection("tcp://127.0.0.1:1", say=print),
    ):
        pass


def test_a_cluster_without_workers_names_the_command_that_starts_one(
    connection: Connection, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.cluster.connection._NO_WORKERS_SECONDS", 0.3)
    with pytest.raises(ClusterError, match=f"tuner worker --cluster {address}"):
        connection.require_workers()


@pytest.mark.parametrize(
    ("address", "is_exposed"),
    [
        ("tcp://10.0.0.5:8786", True),
        ("tcp://cluster.example:8786", True),
        ("tcp://0.0.0.0:8786", True),
        ("tcp://127.0.0.1:8786", False),
        ("tcp://localhost:8786", False),
        ("tcp://[::1]:8786", False),
        ("tls://10.0.0.5:8786", False),
    ],
)
def test_a_scheduler_that_others_reach_without_tls_is_warned_of(
    address: str, is_exposed: bool
) -> None:
    warning = exposure(address)
    assert (warning is not None) == is_exposed
    assert warning is None or "run programs as you" in warning


def listening(worker: Program) -> set[str]:
    """The addresses on which it and its training processes can be reached."""
    host = psutil.Process(worker.process.pid)
    return {
        link.laddr.ip
        for process in [host, *host.children(recursive=True)]
        for link in process.net_connections(kind="inet")
        if link.status == psutil.CONN_LISTEN
    }


def test_a_worker_of_a_scheduler_on_this_machine_is_reached_from_this_machine_only(
    address: str, connection: Connection
) -> None:
    with program(*TUNER_WORKER, address) as worker:
        worker.says("Joined", timeout=60)
        assert listening(worker) == {"127.0.0.1"}
        assert not [line for line in worker.lines if "WARNING" in line]


def test_a_worker_that_listens_everywhere_warns(address: str, connection: Connection) -> None:
    with program(*TUNER_WORKER, address, "--host", "0.0.0.0") as worker:
        worker.says("Joined", timeout=60)
        assert "0.0.0.0" in listening(worker)
        warning = worker.says("WARNING: tcp://0.0.0.0:")
        assert "without TLS" in warning
        assert len([line for line in worker.lines if "WARNING" in line]) == 1


def test_a_scheduler_that_listens_everywhere_is_warned_of_though_it_was_named_by_loopback() -> None:
    said: list[str] = []
    with (
        scheduler(more=("--host", "0.0.0.0")) as address,
        remote_connection(address, say=said.append),
        program(*TUNER_WORKER, address) as worker,
    ):
        (warning,) = said
        assert warning.startswith("WARNING: tcp://0.0.0.0:")
        worker.says("Joined", timeout=60)
        warned = [line for line in worker.lines if "WARNING: tcp://" in line]
        # It knows the scheduler by the address that others are told: on a machine without a
        # network that is the loopback one.
        assert len(warned) == (0 if is_loopback(f"tcp://{get_ip()}") else 1)


# --- what a worker machine needs ---


PROBE = """
import sys, {module}
print(sorted({{"optuna", "sqlalchemy", "tensorflow"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("tuner.cluster.worker", []),
        ("tuner.cluster.training_task", []),
        ("tuner.cluster.trainings", []),
        ("tuner.search.study", ["optuna", "sqlalchemy"]),  # the probe can see them
    ],
)
def test_a_worker_needs_no_optuna_and_no_database(module: str, found: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(found)


def test_rows_are_fetched_once_for_all_workers_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path))
    sha256 = hashlib.sha256(b"rows").hexdigest()
    fetched: list[int] = []

    def fetch() -> bytes:
        fetched.append(1)
        time.sleep(0.2)
        return b"rows"

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(development_file, "elsewhere", sha256, fetch) for _ in range(8)]
    (copy,) = {future.result() for future in found}
    assert len(fetched) == 1
    copy.write_bytes(b"damaged")
    assert development_file("elsewhere", sha256, fetch).read_bytes() == b"rows"
    assert len(fetched) == 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_rows_that_cannot_be_opened_now_are_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        development_file(str(tmp_path / "rows.npz"), "0" * 64, lambda: None)


def test_rows_with_another_hash_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "rows.npz"
    own.write_bytes(b"rows")
    sha256 = hashlib.sha256(b"rows").hexdigest()
    assert development_file(str(own), sha256, lambda: None) == own
    own.write_bytes(b"other rows")
    with pytest.raises(FileNotFoundError, match="the scheduler has others"):
        development_file(str(own), sha256, own.read_bytes)
    with pytest.raises(FileNotFoundError, match="the scheduler has none"):
        development_file(str(own), sha256, lambda: None)
    assert not list((tmp_path / "cache").rglob("*.npz"))


LISTING = "0, GPU-aa11\n1, GPU-bb22\n"


@pytest.mark.parametrize(
    ("listing", "devices", "visible", "gpus"),
    [
        (None, ["nvidiactl", "nvidia-uvm"], None, []),
        (LISTING, [], None, [("0", "GPU-aa11"), ("1", "GPU-bb22")]),
        (None, ["nvidia10", "nvidia2", "nvidiactl"], None, [("2", "index-2"), ("10", "index-10")]),
        (LISTING, [], "1", [("1", "GPU-bb22")]),
        (LISTING, [], "GPU-bb22", [("GPU-bb22", "GPU-bb22")]),
        (LISTING, [], "GPU-b", [("GPU-b", "GPU-bb22")]),  # the same lock as for index 1
        (LISTING, [], "1, 0", [("1", "GPU-bb22"), ("0", "GPU-aa11")]),
        (LISTING, [], "", []),
        (LISTING, [], "-1", []),
        (LISTING, [], "0,-1,1", [("0", "GPU-aa11")]),  # CUDA stops at the first invalid entry
        (LISTING, [], "0,7,1", [("0", "GPU-aa11")]),
        (None, [], "0,1", [("0", "index-0"), ("1", "index-1")]),  # nothing to look them up in
        (LISTING, [], "MIG-cc33", [("MIG-cc33", "MIG-cc33")]),
    ],
)
def test_the_gpus_of_a_worker_are_those_that_cuda_would_show_it(
    listing: str | None, devices: list[str], visible: str | None, gpus: list[tuple[str, str]]
) -> None:
    assert visible_gpus(listing, devices, visible) == tuple(Gpu(*gpu) for gpu in gpus)


def test_two_workers_of_a_machine_do_not_share_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done <<.\n{LISTING}.\n')
    program.chmod(0o755)
    environment = {"PATH": str(tmp_path)}
    with gpus_for(1, environment) as first:
        assert first == ("0",)
        with gpus_for("auto", environment) as second:
            assert second == ("1",)
            with pytest.raises(ClusterError, match="0 of the 2"), gpus_for(1, environment):
                pass
        with pytest.raises(ClusterError, match=r"2 worker.* 1 of the 2"), gpus_for(2, environment):
            pass
        with gpus_for(3, environment | {"CUDA_VISIBLE_DEVICES": ""}) as none:
            assert none == ()
    with gpus_for("auto", environment) as all_of_them:
        assert all_of_them == ("0", "1")


def test_each_training_process_sees_one_gpu_of_its_own_and_takes_its_memory_as_it_needs_it() -> (
    None
):
    first, second = _environments(2, 1, ("0", "GPU-bb22"))
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0", "GPU-bb22")
    for environment in (first, second):
        assert environment["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
        assert environment["TF_NUM_INTRAOP_THREADS"] == environment["OMP_NUM_THREADS"] == "1"
    without = _environments(2, 3, ())
    assert len(without) == 2
    # Not even empty: a machine without nvidia-smi may have a GPU that TensorFlow knows.
    assert all("CUDA_VISIBLE_DEVICES" not in environment for environment in without)
    assert all(environment["TF_NUM_INTRAOP_THREADS"] == "3" for environment in without)


GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "TF_FORCE_GPU_ALLOW_GROWTH")


class TellingRun(FakeRun):
    """Its weights are what the training process finds in its environment."""

    def best_weights(self) -> bytes:
        return json.dumps([os.environ.get(name) for name in GPU_VARIABLES]).encode()


def test_training_processes_of_a_machine_with_two_gpus_have_one_each(
    tmp_path: Path, address: str, connection: Connection
) -> None:
    program_file = tmp_path / "nvidia-smi"
    program_file.write_text(f"#!/bin/sh\ncat <<.\n{LISTING}.\n")
    program_file.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "0,1",  # whatever this machine's says
    }
    tuned = make_study(tmp_path, small_spec(trials=4, seed=30, hyperband=None))
    with program(*TUNER_WORKER, address, "--workers", "auto", environment=environment) as worker:
        worker.says("with 2 workers", timeout=60)
        wait_until(lambda: connection.slots() == 2)
        with Cluster(
            connection,
            StudyTrainings(tuned),
            development_file=tmp_path,
            threads=1,
            open_run=TellingRun,
        ) as cluster:
            Coordinator(tuned, cluster, Notes()).run()
        assert_whole(tuned, 4)
        told = [json.loads(tuned.artifacts.weights(n).read_bytes()) for n in range(4)]
        assert {device for device, _ in told} == {"0", "1"}
        assert {growth for _, growth in told} == {"true"}
    tuned.storage.close()


def test_a_memory_limit_is_shared_out_or_as_given() -> None:
    assert WorkerSettings(cluster="x", memory_limit="4GB").memory_bytes(8) == 4_000_000_000
    shared = WorkerSettings(cluster="x")
    assert WorkerSettings(cluster="x", memory_limit="1e30").memory_bytes(1) == sys.maxsize
    assert shared.memory_bytes(4) == pytest.approx(shared.memory_bytes(1) / 4, abs=4)
