"""The wheel: built by the backend that is installed, and installed where there is nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from folders import ROOT, STUDIES, tracked_files

import tuner
from tuner.commands import DISTRIBUTION

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def packaged_files() -> set[str]:
    """What git holds of the package, by its path in the project."""
    inside = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    return {path for path in inside if path.startswith("tuner/")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git holds, in a folder of its own: a build writes beside the sources."""
    folder = tmp_path_factory.mktemp("build")
    for path in [*packaged_files(), "pyproject.toml", "README.md", "LICENSE"]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    # What pip calls, without an index or an environment of its own for the build.
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel; what it needs is borrowed from ours."""
    venv = tmp_path_factory.mktemp("venv")
    offline = ["--no-download", "--no-periodic-update", "--app-data", str(venv / "seed")]
    subprocess.run([sys.executable, "-m", "virtualenv", "--quiet", *offline, str(venv)], check=True)
    python = next(venv.glob("[bS]*/python*"))
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)],
        check=True,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (site,) = venv.glob("[lL]ib/**/site-packages")
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    return python.parent


def run(installed: Path, folder: Path, program: str, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [installed / program, *arguments],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_git_holds_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("tuner/")}
    assert names == packaged_files()
    assert {path.suffix for path in map(Path, names)} >= {".py", ".jinja", ".css", ".js", ".toml"}
    assert "tuner/py.typed" in names


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Name"] == DISTRIBUTION
    assert found["Version"] == tuner.__version__
    assert found["License-Expression"] == "MIT"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(found.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_an_installed_wheel_has_its_verbs_and_examples_in_any_folder(
    installed: Path, tmp_path: Path
) -> None:
    where = run(installed, tmp_path, "python", "-c", "import tuner; print(tuner.__file__)")
    assert installed.parent in Path(where).parents
    assert run(installed, tmp_path, "tuner", "--version").strip() == tuner.__version__
    run(installed, tmp_path, "tuner", "init")
    shipped = {path.name: path.read_bytes() for path in STUDIES.glob("*.toml")}
    made = {path.name: path.read_bytes() for path in (tmp_path / "studies").glob("*.toml")}
    assert made == shipped
    said = run(
        installed, tmp_path, "tuner", "check", "studies/quickstart.toml",
        "--set", "data.source=synthetic",
    )  # fmt: skip
    assert "16, at most 9 epochs each" in said


def test_the_packaged_study_files_are_those_of_the_project() -> None:
    packaged = {path.name: path.read_text() for path in (ROOT / "tuner/examples").glob("*.toml")}
    assert packaged == {path.name: path.read_text() for path in STUDIES.glob("*.toml")}, (
        "run `make docs`"
    )


def test_every_extra_that_is_named_exists_and_is_told_of() -> None:
    """In messages and pages, as `pip install 'NAME[EXTRA]'` has it; none under another name."""
    extras = set(PROJECT["optional-dependencies"])
    guide = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(rf"{DISTRIBUTION}\[(\w+)\]", guide)) == extras
    for path in tracked_files():
        if path.suffix not in (".py", ".md", ".jinja", ".toml", ".yaml", ".yml"):
            continue
        text = path.read_text(encoding="utf-8")
        called = re.findall(r"install_command\(['\"](\w+)['\"]\)", text)
        assert set(re.findall(rf"{DISTRIBUTION}\[(\w+)\]", text)) | set(called) <= extras, path
        assert not re.search(r"(?<!-)\btuner\[\w+\]", text), path
