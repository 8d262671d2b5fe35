"""docs/clusters.md and the files beside it: what can be tried without SLURM, Kubernetes and SSH."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import distributed.worker
import pytest
import yaml
from command_lines import parse
from folders import ROOT
from waiting import wait_until

FILES = ROOT / "docs" / "clusters"
GUIDE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
MANIFESTS = sorted(FILES.glob("kubernetes*.yaml"))


# --- the guide ---


def guide_commands() -> Iterator[list[str]]:
    """Every command of ours in the guide's blocks and in the comments that head its files."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    heads = [
        "\n".join(line[1:].strip() for line in path.read_text().splitlines() if line[:4] == "#   ")
        for path in (*FILES.iterdir(), ROOT / "docker-compose.yml")
        if path.is_file()
    ]
    for line in "\n".join((*blocks, *heads)).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):  # VARIABLE=value in front
            words = words[1:]
        if words[:4] == ["docker", "compose", "run", "--rm"] and words[4] == "tuner":
            words = words[4:]
        words = words[: words.index("&&")] if "&&" in words else words
        # A column of words beside it says what it does.
        line_end = re.search(r" {2,}", line.partition("#")[0].strip())
        if line_end:
            words = words[: len(shlex.split(line.strip()[: line_end.start()]))] or words
        if words and words[0] in ("tuner", "dask"):
            yield words


def test_every_command_of_the_guide_is_one_that_its_program_takes() -> None:
    commands = list(guide_commands())
    for words in commands:
        options = parse(words)
        if words[0] == "dask":
            assert options["preload"] == ("tuner.cluster.processes",)
    assert {words[1] for words in commands} >= {"worker", "launch", "scheduler", "serve"}


def test_every_file_of_the_guide_is_there_and_named() -> None:
    named = set(re.findall(r"clusters/([\w-]+\.[\w.]*\w)", GUIDE))
    assert named == {path.name for path in FILES.iterdir() if path.is_file()}
    for label, target in re.findall(r"\[`([\w.-]+)`\]\((.*?)\)", GUIDE):
        assert label == Path(target).name
        assert (ROOT / "docs" / target).exists()


def test_what_the_guide_quotes_is_what_is_said() -> None:
    said = {
        node.value
        for path in (ROOT / "tuner").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    quotes = re.findall(r"^\| `(.*?)`", GUIDE, re.MULTILINE)
    assert len(quotes) > 8
    for quote in quotes:
        # Between what differs each time: addresses, numbers, reasons.
        for part in re.split(r"\.\.\.|tcp://|\d+|: |; |\$", quote):
            assert any(part.strip() in one for one in said), f"nobody says {part!r}"


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "docker-compose.yml",
        ROOT / "docs" / "clusters.md",
        *(path for path in sorted(FILES.iterdir()) if "scheduler --protocol" in path.read_text()),
        FILES / "kubernetes.yaml",
        FILES / "kubernetes-dask-operator.yaml",
    ],
    ids=lambda path: path.name,
)
def test_every_scheduler_has_the_settings_that_studies_need(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name, value in jobqueue().SCHEDULER_SETTINGS.items():
        variable = "DASK_" + name.upper().replace(".", "__").replace("-", "_")
        found = re.findall(rf"{variable}(?:=|: |, value: )[\"']?(\w+)", text)
        assert found == [str(value)] * max(1, len(found)), variable
    # And one that keeps its log readable, which a script's own scheduler does not write.
    assert re.search(
        r"\bDASK_LOGGING\b.*{'distributed': 'info', 'distributed.worker': 'warning'}", text
    )


def test_the_guide_counts_its_settings() -> None:
    words, block = re.search(
        r"with (\w+) settings in its environment:\n\n```sh\n(.*?)```", GUIDE, re.DOTALL
    ).groups()
    assert words == ("one", "two", "three", "four", "five")[block.count("export ") - 1]


def test_a_schedulers_log_does_not_tell_of_every_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    value = re.search(r'export DASK_LOGGING="(.*?)"', GUIDE)[1]
    levels = dask.config.collect_env({"DASK_LOGGING": value})["logging"]
    assert levels == {"distributed": "info", "distributed.worker": "warning"}
    # Where Dask says that it runs a function which a client sent, as a glance is.
    assert 'logger.info("Run out-of-band function %r"' in inspect.getsource(distributed.worker)
    assert distributed.worker.logger.name == "distributed.worker"


def jobqueue() -> Any:
    """docs/clusters/slurm_jobqueue.py as a module."""
    spec = importlib.util.spec_from_file_location("jobqueue", FILES / "slurm_jobqueue.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Kubernetes ---


def resources(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def pods(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pods of a manifest, by name: those of Deployments and their like, and the operator's."""
    for resource in resources(path):
        spec, name = resource.get("spec", {}), resource["metadata"]["name"]
        if "template" in spec:
            yield f"{resource['kind']} {name}", spec["template"]["spec"]
        if resource["kind"] == "DaskCluster":
            yield f"{name} scheduler", spec["scheduler"]["spec"]
            yield f"{name} worker", spec["worker"]["spec"]


def pod_problems(pod: dict[str, Any]) -> Iterator[str]:
    context = pod.get("securityContext", {})
    if not (context.get("runAsNonRoot") and context.get("runAsUser", 0) > 0):
        yield "may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "makes any system call"
    if pod.get("automountServiceAccountToken", True):
        yield "holds a token of the cluster"
    if pod.get("enableServiceLinks", True):
        yield "gets variables of all services, of which one could be called TUNER_..."
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "reaches into the machine"
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        limits = container.get("securityContext", {})
        if limits.get("allowPrivilegeEscalation", True) or limits.get("privileged"):
            yield "may gain privileges"
        if not limits.get("readOnlyRootFilesystem"):
            yield "its root file system can be written"
        if limits.get("capabilities") != {"drop": ["ALL"]}:
            yield "keeps capabilities"
        for kind in ("requests", "limits"):
            if not {"cpu", "memory"} <= container.get("resources", {}).get(kind, {}).keys():
                yield f"states no {kind}"
        for variable in container.get("env", []):
            if re.search("PASS|SECRET|TOKEN", variable["name"]) and not re.match(
                "/secrets/", variable["value"]
            ):
                yield f"{variable['name']} is in its environment"
        for mount in container["volumeMounts"]:
            known = {"data"} | volumes.keys()  # data: the StatefulSet's own claim
            if mount["name"] not in known:
                yield f"mounts {mount['name']}, which is no volume"
            if "secret" in volumes.get(mount["name"], {}) and not mount.get("readOnly"):
                yield f"may write the secret {mount['name']}"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_pod_has_what_it_needs_and_no_more(path: Path) -> None:
    found = list(pods(path))
    assert found
    for name, pod in found:
        assert list(pod_problems(pod)) == [], name


def test_a_pod_that_may_more_is_noticed() -> None:
    container = {
        "volumeMounts": [{"name": "nowhere"}],
        "env": [{"name": "PGPASSWORD", "value": "x"}],
    }
    pod = {"containers": [container]}
    assert len(list(pod_problems(pod))) == 11


def programs(pod: dict[str, Any]) -> Iterator[list[str]]:
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        if container["image"].startswith("tuner:"):
            yield [*container.get("command", ["tuner"]), *container["args"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_pod_runs_what_its_program_takes_with_tls(path: Path) -> None:
    for name, pod in pods(path):
        for words in programs(pod):
            options = parse(words)
            if words[0] == "dask":
                assert options["protocol"] == "tls", name
                assert options["preload"] == ("tuner.cluster.processes",), name
                assert options["tls_key"] == "/tls/key.pem", name
            elif "cluster" in options:
                assert options["cluster"].startswith("tls://"), name
                assert options["tls_key"] == Path("/tls/key.pem"), name


def test_services_and_policies_select_pods_that_there_are() -> None:
    labels = [
        resource["spec"]["template"]["metadata"]["labels"]
        for resource in resources(FILES / "kubernetes.yaml")
        if "template" in resource["spec"]
    ]
    for resource in resources(FILES / "kubernetes.yaml"):
        if resource["kind"] == "Service":
            chosen = [one for one in labels if resource["spec"]["selector"].items() <= one.items()]
            assert len(chosen) == 1, resource["metadata"]["name"]
        if resource["kind"] in ("Deployment", "StatefulSet"):
            selector = resource["spec"]["selector"]["matchLabels"]
            assert selector == resource["spec"]["template"]["metadata"]["labels"]
        if resource["kind"] == "NetworkPolicy":
            wanted = resource["spec"]["podSelector"]["matchLabels"]
            assert any(wanted.items() <= one.items() for one in labels)


def test_a_pod_has_more_time_to_end_than_its_program_takes() -> None:
    from tuner.cluster.worker import _LEAVE_SECONDS

    for path in MANIFESTS:
        for name, pod in pods(path):
            if "worker" in name:
                assert pod["terminationGracePeriodSeconds"] >= 2 * _LEAVE_SECONDS, name


# --- TLS ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "tls"
    subprocess.run([FILES / "make-tls.sh", folder], check=True, capture_output=True)
    return folder


def test_certificates_are_for_the_user_s_eyes_and_never_overwritten(certificates: Path) -> None:
    assert {path.name for path in certificates.iterdir()} == {"ca.pem", "cert.pem", "key.pem"}
    for path in (certificates, *certificates.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    again = subprocess.run(
        [FILES / "make-tls.sh", certificates], check=False, capture_output=True, text=True
    )
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_who_holds_the_certificates_reaches_the_cluster_and_nobody_else_does(
    certificates: Path, tmp_path: Path
) -> None:
    from distributed import Client, Scheduler

    from tuner.cluster.scheduler import TlsFiles

    def files(folder: Path) -> TlsFiles:
        return TlsFiles(ca=folder / "ca.pem", cert=folder / "cert.pem", key=folder / "key.pem")

    subprocess.run([FILES / "make-tls.sh", tmp_path / "other"], check=True, capture_output=True)
    ours, theirs = files(certificates).security(), files(tmp_path / "other").security()

    async def reach(security: Any, address: str) -> None:
        async with Client(address, security=security, asynchronous=True, timeout=2):
            pass

    async def attempt() -> None:
        async with Scheduler(
            host="127.0.0.1",
            port=0,
            protocol="tls",
            security=ours,
            dashboard_address="127.0.0.1:0",
        ) as scheduler:
            await reach(ours, scheduler.address)
            with pytest.raises(OSError, match=r"Timed out|certificate"):
                await reach(theirs, scheduler.address)

    asyncio.run(attempt())


# --- SLURM ---


class Node:
    """A machine of a cluster: the project's folder, and programs that only note how they ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / ".venv" / "bin"
        self.notes = folder / "notes"
        self.bin.mkdir(parents=True)
        (folder / "docs").symlink_to(ROOT / "docs")
        (folder / "runs" / "cluster").mkdir(parents=True)
        self.program("scancel", "")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        note = f'printf "%s\\n" "{name} $*" >> {shlex.quote(str(self.notes))}'
        path.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", f"docs/clusters/{script}"],
            cwd=self.folder,
            env={name: value for name, value in os.environ.items() if name != "SLURM_JOB_END_TIME"}
            | {"USER": "anna"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ran(self) -> list[list[str]]:
        return [shlex.split(line) for line in self.notes.read_text().splitlines()]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    node = Node(tmp_path)
    # It serves until it is told to end; its children inherit no pipe of ours.
    node.program(
        "dask",
        'while [ "$1" != --scheduler-file ]; do shift; done; echo "{}" > "$2"\n'
        "trap 'kill $!; exit 0' TERM; sleep 60 >/dev/null 2>&1 & wait",
    )
    node.program("python", "cat > /dev/null")
    return node


@pytest.mark.parametrize("code", [0, 1])
def test_the_slurm_job_ends_as_its_launch_does_and_lets_workers_go_when_it_is_finished(
    node: Node, code: int
) -> None:
    node.program("tuner", f"exit {code}")
    job = node.start("slurm-study.sbatch", STUDY="studies/quickstart.toml")
    output, _ = job.communicate(timeout=20)
    assert job.returncode == code, output
    by_name = {words[0]: words for words in node.ran()}
    scheduler, launch = parse(by_name["dask"]), parse(by_name["tuner"])
    assert scheduler["protocol"] == "tls"
    assert scheduler["preload"] == ("tuner.cluster.processes",)
    assert scheduler["scheduler_file"] == launch["cluster"] == "runs/cluster/scheduler.json"
    assert launch["spec_path"] == Path("studies/quickstart.toml")
    assert launch["tls_key"] == Path(scheduler["tls_key"])
    assert ("scancel" in by_name) is (code == 0)


def test_the_slurm_job_hands_its_signal_to_the_launch_and_waits_for_it(node: Node) -> None:
    node.program(
        "tuner",
        "trap 'kill $!; sleep 0.5; echo saved; exit 130' TERM\n"
        f"sleep 60 >/dev/null 2>&1 & touch {shlex.quote(str(node.folder / 'up'))}; wait",
    )
    job = node.start("slurm-study.sbatch")
    wait_for(node.folder / "up")
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=20)
    assert "saved" in output
    assert job.returncode == 130
    assert "scancel" not in {words[0] for words in node.ran()}


def wait_for(path: Path) -> None:
    wait_until(path.exists, str(path))


def test_a_slurm_worker_leaves_before_its_job_ends_and_hears_the_signals(node: Node) -> None:
    node.program("tuner", "kill -TERM $$")
    job = node.start("slurm-worker.sbatch", SLURM_JOB_END_TIME=str(int(time.time()) + 3600))
    job.communicate(timeout=20)
    assert job.returncode == -signal.SIGTERM  # the worker is the job's own process
    worker = parse(node.ran()[0])
    assert 3400 < worker["lifetime"] <= 3480
    assert worker["workers"] == "auto"
    node.notes.unlink()
    node.start("slurm-worker.sbatch").communicate(timeout=20)  # an older SLURM gives no time
    assert parse(node.ran()[0])["lifetime"] is None


def test_dask_jobqueue_renders_the_script_of_the_guide(certificates: Path) -> None:
    local = {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
    with jobqueue().make_cluster(certificates, scheduler_options=local) as cluster:
        script = cluster.job_script()
        script = script.replace(cluster.scheduler_address, "tls://10.0.0.5:8786")
    script = script.replace(str(certificates), "runs/cluster/tls")
    script = script.replace(sys.executable, ".venv/bin/python")
    shown = re.search(r"```bash\n(#!/usr/bin/env bash.*?)```", GUIDE, re.DOTALL)
    assert shown
    assert [line for line in script.splitlines() if line] == [
        line for line in shown[1].splitlines() if line
    ]
    assert "--resources slot=1" in script


# --- SSH ---


def test_workers_start_and_end_over_ssh(tmp_path: Path) -> None:
    for machine in ("anna", "bert"):
        (tmp_path / machine / "tuner" / ".venv" / "bin").mkdir(parents=True)
        program = tmp_path / machine / "tuner" / ".venv" / "bin" / "tuner"
        program.write_text(
            "#!/bin/sh\necho \"tuner $*\"\ntrap 'echo ended; kill $!; exit' TERM\nsleep 60 & wait\n"
        )
        program.chmod(0o755)
    # What ssh does, but for the way there: the command, by a shell, in the home folder.
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\ncd {shlex.quote(str(tmp_path))}/"$1" && exec sh -c "$2"\n')
    ssh.chmod(0o755)

    def workers(*arguments: str) -> str:
        done = subprocess.run(
            [FILES / "ssh-workers.sh", *arguments],
            env=os.environ | {"SSH": str(ssh)},
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with contextlib.ExitStack() as stack:
        said = workers("start", "tls://10.0.0.5:8786", "anna", "bert")
        stack.callback(workers, "stop", "anna", "bert")
        assert "bert: started" in said
        for machine in ("anna", "bert"):
            log = tmp_path / machine / "tuner" / "runs" / "worker.log"
            wait_for_text(log, "tuner worker")
            assert parse(shlex.split(log.read_text()))["cluster"] == "tls://10.0.0.5:8786"
    for machine in ("anna", "bert"):
        wait_for_text(tmp_path / machine / "tuner" / "runs" / "worker.log", "ended")


def wait_for_text(path: Path, text: str) -> None:
    wait_until(
        lambda: path.exists() and text in path.read_text(), f"{text!r} did not come to {path}"
    )
