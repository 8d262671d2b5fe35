"""What keeps the house in order: locks, set-up, Makefile, packaging, and what git may hold."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from folders import ROOT, tracked_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = ("cpu", "gpu", "dev", "compare")
BENCHMARKS = ROOT / "benchmarks"
PYTHON = shlex.quote(sys.executable)

# In two halves each, so that this file does not hold what it looks for.
REGISTRY_HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "npm" + "js.org",
    "conda.ana" + "conda.org",
    "artifact" + "ory",
    "pkg.d" + "ev",
]
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:root|work|farm|home/\w+|Users/\w+)/(?=[\w.])")
DATA_SHA256 = "37b2e198e5d28a7468c67d7599c88f4ab4c37d8d2481be7fb314f40caeaf085d"


def requirements(lock: str) -> dict[str, list[tuple[Requirement, str]]]:
    """A lock's requirements with their hashes, by name; a name comes once for each marker."""
    text = (ROOT / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
    found: dict[str, list[tuple[Requirement, str]]] = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        head, _, hashes = entry.partition("--hash=")
        requirement = Requirement(head.replace("\\", "").strip())
        found.setdefault(canonicalize_name(requirement.name), []).append((requirement, hashes))
    return found


def version_of(requirement: Requirement) -> Version:
    (pin,) = requirement.specifier
    return Version(pin.version)


def declared(table: str) -> list[Requirement]:
    project = PYPROJECT["project"]
    lists = {
        "runtime": project["dependencies"],
        "cpu": project["optional-dependencies"]["cpu"],
        "gpu": project["optional-dependencies"]["gpu"],
        **{
            extra: project["optional-dependencies"][extra]
            for extra in ("audit", "onnx", "mlflow", "tensorboard")
        },
        **PYPROJECT["dependency-groups"],
        "build": PYPROJECT["build-system"]["requires"],
    }
    return [Requirement(line) for line in lists[table]]


# --- locks ---


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_and_hashes_every_requirement_and_names_no_place(lock: str) -> None:
    locked = requirements(lock)
    assert len(locked) > 20
    for entries in locked.values():
        for requirement, hashes in entries:
            assert requirement.url is None
            assert [pin.operator for pin in requirement.specifier] == ["=="]
            assert re.match(r"sha256:[0-9a-f]{64}\b", hashes), requirement
    text = (ROOT / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
    assert not re.search(
        r"://|--(?:extra-)?index-url|--find-links|--trusted-host|^-", text, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("table", "lock"),
    [
        ("runtime", "cpu"),
        ("runtime", "gpu"),
        ("cpu", "cpu"),
        ("gpu", "gpu"),
        ("dev", "dev"),
        ("compare", "compare"),
        # The set-up builds the project without an index, with what the lock brought.
        ("build", "cpu"),
        ("build", "gpu"),
    ],
)
def test_what_pyproject_asks_for_is_locked_at_a_version_that_fits(table: str, lock: str) -> None:
    locked = requirements(lock)
    for wanted in declared(table):
        entries = locked.get(canonicalize_name(wanted.name))
        assert entries, f"locks/{lock}.txt lacks {wanted.name}: run `make lock`"
        for entry, _ in entries:
            assert version_of(entry) in wanted.specifier, f"{entry} is not {wanted}: `make lock`"
            # Where the lock leaves an extra out, pip looks for its own version of the package,
            # and refuses that for its missing hash as soon as there is a newer one.
            assert wanted.extras <= entry.extras, f"{entry} lacks the extras of {wanted}"


@pytest.mark.parametrize("tools", ["dev", "compare"])
def test_the_tools_are_locked_at_the_versions_that_run_beside_them(tools: str) -> None:
    runtime = requirements("cpu")
    for name, entries in requirements(tools).items():
        if name in runtime:
            pins = {str(entry.specifier) for entry, _ in runtime[name]}
            assert {str(entry.specifier) for entry, _ in entries} <= pins, name


def test_every_package_that_is_imported_is_declared() -> None:
    modules = {
        "optuna_dashboard": "optuna-dashboard",
        "yaml": "pyyaml",
        "keras": "tensorflow",  # TensorFlow pins the Keras that it goes with
        "markupsafe": "jinja2",
        "dask": "distributed",
        "pydantic_core": "pydantic",
        "mlflow": "mlflow-skinny",
        "sklearn": "scikit-learn",
    }
    names = {canonicalize_name(wanted.name) for wanted in declared("runtime") + declared("cpu")}
    for extra in ("audit", "onnx", "mlflow", "tensorboard"):
        names |= {canonicalize_name(wanted.name) for wanted in declared(extra)}
    for path in sorted((ROOT / "tuner").rglob("*.py")):
        for module in imported_modules(path):
            if module != "tuner" and module not in sys.stdlib_module_names:
                package = canonicalize_name(modules.get(module, module))
                assert package in names, f"{path.name} imports {module}: add it to pyproject.toml"


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


# --- what git holds ---


def test_no_file_names_a_package_registry_a_folder_of_one_machine_or_a_conflict() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        for number, line in enumerate(text.splitlines(), start=1):
            hits = [host for host in REGISTRY_HOSTS if host in line]
            hits += [match.group() for match in MACHINE_PATH.finditer(line)]
            hits += [mark for mark in ("<<<<<<< ", ">>>>>>> ") if line.startswith(mark)]
            found += [f"{path.relative_to(ROOT)}:{number}: {hit}" for hit in hits]
    assert not found


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("see /ho" + "me/ada/tuner", True),
        ("cd /wo" + "rk/main", True),
        ("'/ro" + "ot/.cache'", True),
        ("/Us" + "ers/ada/x", True),
        ("https://example.org/work/item", False),
        ("../work/item", False),
        ("~/lab/item", False),
        ("/usr/lib", False),
    ],
)
def test_a_folder_of_one_machine_is_told_from_other_paths(line: str, is_one: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is is_one


def test_neither_the_data_set_nor_a_large_file_is_committed() -> None:
    for path in tracked_files():
        content = path.read_bytes()
        assert len(content) < 1_000_000, path
        assert hashlib.sha256(content).hexdigest() != DATA_SHA256, path


# --- make ---


@pytest.mark.parametrize("script", [".ci/run", "locks/install"])
def test_a_script_can_be_run(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!")


def test_make_alone_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} == set(phony[1].split())
    assert set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) == set(phony[1].split())


class SetUp:
    """A small copy of the project with its set-up, and a uv that only notes how it was called."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        (self.project / "locks").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / "locks" / "install", self.project / "locks" / "install")
        (self.project / "locks" / "cpu.txt").write_text("one\n")
        (self.project / "locks" / "dev.txt").write_text("two\n")
        (self.project / "pyproject.toml").write_text("")
        for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
            self.program(name, f'exec {PYTHON} "$@"')
        self.note_call = f'echo "$@" >> {shlex.quote(str(self.calls))}'
        self.program("uv", self.note_call)

    def program(self, name: str, line: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
        """Exit code, what uv was asked for, and what was said."""
        self.calls.write_text("")
        done = subprocess.run(
            ["locks/install", *arguments],
            cwd=self.project,
            env={"PATH": f"{self.bin}:/usr/bin:/bin", **environment},
            check=False,
            capture_output=True,
            text=True,
        )
        asked = re.findall(r"-r locks/(\w+)\.txt|(--editable)", self.calls.read_text())
        return done.returncode, [lock or "project" for lock, _ in asked], done.stderr


@pytest.fixture
def set_up(tmp_path: Path) -> SetUp:
    return SetUp(tmp_path)


def test_the_second_set_up_does_nothing_and_tools_come_on_top(set_up: SetUp) -> None:
    assert set_up.run("cpu")[:2] == (0, ["cpu", "project"])
    assert set_up.run("cpu") == (0, [], "")
    assert set_up.run("cpu", "dev")[:2] == (0, ["dev"])
    assert set_up.run("cpu", "dev") == (0, [], "")
    assert set_up.run("cpu") == (0, [], "")


def test_a_changed_lock_makes_a_new_environment_and_a_changed_project_does_not(
    set_up: SetUp,
) -> None:
    set_up.run("cpu", "dev")
    kept = set_up.project / ".venv" / "kept"
    kept.touch()
    (set_up.project / "pyproject.toml").write_text("# changed\n")
    assert set_up.run("cpu", "dev")[:2] == (0, ["project"])
    (set_up.project / "locks" / "dev.txt").write_text("three\n")
    assert set_up.run("cpu", "dev")[:2] == (0, ["dev"])
    assert kept.exists()
    (set_up.project / "locks" / "cpu.txt").write_text("four\n")
    assert set_up.run("cpu", "dev")[:2] == (0, ["cpu", "project", "dev"])
    assert not kept.exists()


def test_the_project_under_its_former_name_is_removed(set_up: SetUp) -> None:
    set_up.run("cpu")
    (site,) = (set_up.project / ".venv").glob("lib/*/site-packages")
    (site / "tuner-0.1.0.dist-info").mkdir()
    (site / "tuner-0.1.0.dist-info" / "METADATA").write_text("Name: tuner\nVersion: 0.1.0\n")
    (set_up.project / "pyproject.toml").write_text("# renamed\n")
    assert set_up.run("cpu")[:2] == (0, ["project"])
    removal, installation = set_up.calls.read_text().splitlines()
    assert removal.startswith("pip uninstall ")
    assert removal.endswith(" tuner")
    assert "--editable" in installation


def test_an_interrupted_set_up_is_made_anew(set_up: SetUp) -> None:
    killed = 'case "$*" in *--editable*) kill -9 $PPID;; esac'
    set_up.program("uv", f"{set_up.note_call}; {killed}")
    code, asked, _ = set_up.run("cpu")
    assert (code, asked) == (-9, ["cpu", "project"])
    set_up.program("uv", set_up.note_call)
    code, asked, said = set_up.run("cpu")
    assert (code, asked) == (0, ["cpu", "project"])
    assert "interrupted" in said


def test_two_set_ups_at_once_do_not_work_in_one_folder(set_up: SetUp) -> None:
    set_up.run("cpu")
    mark = set_up.project / ".venv" / ".tuner" / "working"
    mark.write_text(f"{os.getpid()}\n")
    code, asked, said = set_up.run("cpu")
    assert (code, asked) == (1, [])
    assert f"process {os.getpid()} is setting up .venv" in said


def test_a_moved_project_and_a_dead_interpreter_make_a_new_environment(set_up: SetUp) -> None:
    set_up.run("cpu")
    set_up.project = set_up.project.rename(set_up.project.with_name("elsewhere"))
    assert set_up.run("cpu")[:2] == (0, ["cpu", "project"])
    python = set_up.project / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("gone")
    code, asked, said = set_up.run("cpu")
    assert (code, asked) == (0, ["cpu", "project"])
    assert "does not run" in said


def test_an_interpreter_is_judged_by_running_it(set_up: SetUp) -> None:
    for name in ("python3", "python3.13"):  # as pyenv's shims answer
        set_up.program(name, f"echo 'pyenv: {name}: command not found' >&2; exit 127")
    code, _, said = set_up.run("cpu")
    assert code == 0
    assert "with python3.12, Python 3.1" in said


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_an_interpreter_of_another_version_is_passed_over(
    set_up: SetUp, version: tuple[int, int]
) -> None:
    pretend = f"import sys; sys.version_info = {version}"
    for name in ("python3", "python3.13"):
        set_up.program(name, f'{{ echo "{pretend}"; cat; }} | {PYTHON} "$@"')
    code, _, said = set_up.run("cpu")
    assert code == 0
    assert "with python3.12, Python 3.1" in said


def test_without_a_fitting_python_the_set_up_says_what_it_needs_and_touches_nothing(
    set_up: SetUp,
) -> None:
    set_up.run("cpu")
    (set_up.project / "locks" / "cpu.txt").write_text("changed\n")
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        set_up.program(name, '[ "$1" = --version ] && echo Python 3.9.2; exit 1')
    set_up.program("uv", "exit 2")
    code, _, said = set_up.run("cpu")
    assert code == 1
    assert "no 64-bit CPython 3.11, 3.12 or 3.13 on PATH (python3 is: Python 3.9.2)" in said
    assert (set_up.project / ".venv" / "bin" / "python").exists()
    code, _, said = set_up.run("cpu", PYTHON="python3.13")
    assert code == 1
    assert "PYTHON=python3.13 is not a 64-bit CPython" in said


# --- the last look of conftest.py ---


@pytest.mark.parametrize(
    ("test", "left"),
    [
        ("subprocess.Popen(['sleep', '60'], start_new_session=True)", "process"),
        ("left.append(socket.create_server(('127.0.0.1', 0)))", "port"),
        ("pathlib.Path('left.txt').touch()", "file"),
        ("pass", None),
    ],
)
def test_what_a_test_leaves_behind_fails_the_session(
    tmp_path: Path, test: str, left: str | None
) -> None:
    done = session_with(test, tmp_path)
    assert done.returncode == (1 if left else 0), done.stdout
    assert ("the tests left behind" in done.stdout) is bool(left)
    if left:
        assert re.search(rf"^  {left} ", done.stdout, re.MULTILINE)


def test_temporary_files_go_with_the_session(tmp_path: Path) -> None:
    here = "import os, tempfile; there = tempfile.mkdtemp()"
    told = "pathlib.Path('../told').write_text(f'{there}\\n' + os.environ['TMPDIR'])"
    done = session_with(f"{here}; {told}", tmp_path / "project")
    assert done.returncode == 0, done.stdout
    made, folder = map(Path, (tmp_path / "told").read_text().splitlines())
    assert made.parent == folder != Path(tempfile.gettempdir())
    assert not folder.exists()


def session_with(test: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs pytest on one test and our conftest.py."""
    (folder / "tests").mkdir(parents=True)
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    conftest = conftest.replace("PATIENCE = 10.0", "PATIENCE = 0.2")
    (folder / "tests" / "conftest.py").write_text(conftest)
    (folder / "tests" / "test_it.py").write_text(
        f"import pathlib, socket, subprocess\nleft = []\ndef test_it():\n    {test}\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},  # what conftest.py imports
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_page_of_benchmarks_is_made_from_their_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    render = importlib.import_module("render")
    written = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert written == render.page(), "run .venv/bin/python benchmarks/render.py"


def test_time_to_quality_searches_one_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ours and the others sample has the same names, ranges and network."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    peers, ours = (importlib.import_module(name) for name in ("peer_search", "time_to_quality"))
    space = ours.study_of(0).space
    for seed in range(40):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        trial = study.ask()
        for_ours = dataclasses.asdict(space.suggest(trial))
        study.enqueue_trial(trial.params)
        again = study.ask()
        for_keras = peers.suggest(peers.OfOptuna(again))
        assert again.params == trial.params
        assert again.distributions == trial.distributions
        assert not for_ours["masking"]  # Keras' convolutions drop the mask
        blocks = zip(for_ours.pop("blocks"), for_keras.pop("blocks"), strict=True)
        dense = zip(for_ours.pop("dense"), for_keras.pop("dense"), strict=True)
        for has, theirs in [(for_ours, for_keras), *blocks, *dense]:
            assert theirs.items() <= has.items()


def test_every_benchmark_is_told_of() -> None:
    told = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert {script.name for script in BENCHMARKS.glob("*.py") if script.name not in told} == {
        "machine.py"  # says what a result was measured on
    }


# --- words ---


def test_the_guide_to_development_counts_the_locks() -> None:
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    word = ("one", "two", "three", "four", "five")[len(LOCKS) - 1]
    assert f"The {word} locks serve" in text
    assert {path.stem for path in (ROOT / "locks").glob("*.txt")} == set(LOCKS)


def test_every_layer_is_a_module_that_is_there() -> None:
    (layers,) = (
        one["layers"] for one in PYPROJECT["tool"]["importlinter"]["contracts"] if "layers" in one
    )
    names = [name.strip() for layer in layers for name in layer.split("|")]
    for name in names:
        places = (ROOT / "tuner" / f"{name}.py", ROOT / "tuner" / name / "__init__.py")
        assert any(place.exists() for place in places), name


COUNTED = re.compile(
    r"\s(?:\w+ )?(epochs(?!/s)|trials|workers|slots|studies|rows|sequences|trainings|times|networks"
    r"|openings|processes|lines|fields|users|files|problems|mistakes|brackets)\b"
)
NEVER_ONE = {  # what stands before the noun is a constant, or a count of many
    " trials in a row failed, so the study stops; the last reason, of trial ",
    " workers died of it without a new epoch",
    " test rows (",
    " test rows (sealed), identity ",
    " validation rows; split ",
    " rows trained when max_trial_seconds = ",
    " trials",
    " mistakes were found up to here; correct them first",
    " sequences have only the letters ",
    " generated sequences; its figures say nothing about proteins",
}


def test_a_count_before_a_noun_goes_through_counted() -> None:
    found = []
    for path in sorted((ROOT / "tuner").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and "(s)" in str(node.value):
                found.append((path.name, node.lineno, node.value))
            if not isinstance(node, ast.JoinedStr):
                continue
            for value, text in itertools.pairwise(node.values):
                if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                    words = str(text.value)
                    if COUNTED.match(words) and words not in NEVER_ONE:
                        found.append((path.name, node.lineno, words))
                        found.append((path.name, node.lineno, words))
    assert found == [], "write the count with tuner.errors.counted: 1 epoch, 2 epochs"


def test_every_test_that_a_page_names_exists() -> None:
    """`tests/test_x.py::test_y`, and after it `::test_z` of the same file."""
    missing, named = [], 0
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        file = ""
        for path, name in re.findall(r"(tests/[\w/]+\.py)?::(test_\w+)", page.read_text("utf-8")):
            file, named = path or file, named + 1
            if not re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE):
                missing.append((page.name, file, name))
    assert named > 50
    assert missing == []
