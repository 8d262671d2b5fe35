"""Files that are whole, whatever happens while they are written."""

from __future__ import annotations

import io
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuner.artifacts import artifact_store, make_folder, publish, replaceable, require_writable
from tuner.dashboard.users import write_user
from tuner.data.delivery import one_process_at_a_time
from tuner.storage.storage import Storage


def test_what_gets_the_name_is_on_the_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        done.append(("folder", 0) if status.st_ino == folder else ("file", status.st_size))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        done.append(("name", 0))
        replace(source, target)

    folder = tmp_path.stat().st_ino
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    publish(tmp_path / "7.npz", b"weights")
    assert done == [("file", 7), ("name", 0), ("folder", 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["7.npz"]


def test_a_file_system_that_cannot_sync_a_folder_takes_the_file_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    publish(tmp_path / "7.npz", b"weights")
    assert (tmp_path / "7.npz").read_bytes() == b"weights"


def test_a_disk_that_fails_leaves_the_old_file_and_no_half_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    publish(tmp_path / "7.npz", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path / "7.npz", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"7.npz": b"old"}


def test_who_may_no_longer_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "7.npz"
    publish(file, b"old")
    asked: list[set[str]] = []

    def may_write(answer: bool) -> bool:
        asked.append({path.read_bytes().decode() for path in tmp_path.iterdir()})
        return answer

    publish(file, b"new", only_if=lambda: may_write(False))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"7.npz": b"old"}
    publish(file, b"newer", only_if=lambda: may_write(True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"7.npz": b"newer"}
    # Asked when all was written, so that nothing but the new name comes after.
    assert asked == [{"old", "new"}, {"old", "newer"}]


# --- what has the name already ---


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def make_link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def make_link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (make_pipe, "it is not a regular file"),
        (make_socket, "it is not a regular file"),
        (Path.mkdir, "it is not a regular file"),
        (make_link_to_a_pipe, "it is not a regular file"),
        (make_link_in_a_circle, "symbolic links"),
    ],
)
def test_what_is_not_a_regular_file_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], told: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("there"))
    before = {path.name: (path.lstat().st_ino, path.lstat().st_mode) for path in Path().iterdir()}
    with pytest.raises(OSError, match=told):
        publish(Path("there"), b"weights")
    after = {path.name: (path.lstat().st_ino, path.lstat().st_mode) for path in Path().iterdir()}
    assert after == before
    with pytest.raises(OSError, match=told):
        require_writable(Path(), "there")


def test_a_device_is_not_replaceable() -> None:
    with pytest.raises(OSError, match="it is not a regular file"):
        replaceable(Path(os.devnull))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_the_file_that_it_names_is_written(tmp_path: Path, is_there: bool) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "7.npz", tmp_path / "link.npz"
    if is_there:
        target.write_bytes(b"old")
    (tmp_path / "link").symlink_to("there/7.npz")
    link.symlink_to("link")
    publish(link, b"new")
    assert link.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["7.npz"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "7.npz"
    file.write_bytes(b"old")
    file.chmod(mode)
    publish(file, b"new")
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_private_file_is_private_before_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "7.npz"
    file.write_bytes(b"old")
    file.chmod(0o600)
    asked: list[tuple[Path, int | None]] = []
    opened = os.open

    def note(path: Path, flags: int, mode: int = 0o777) -> int:
        asked.append((path, mode))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", note)
    publish(file, b"new", durable=False)
    assert [mode for _, mode in asked] == [0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize(
    ("may", "uid", "gid", "mode"),
    [
        ("owner and group", 65534, 65534, 0o664),
        ("group", 0, 65534, 0o664),
        ("neither", 0, 0, 0o644),
    ],
)
def test_a_file_keeps_its_owner_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may: str, uid: int, gid: int, mode: int
) -> None:
    file = tmp_path / "7.npz"
    file.write_bytes(b"old")
    file.chmod(0o664)
    os.chown(file, 65534, 65534)

    give = os.fchown

    def give_or_refuse(descriptor: int, to_user: int, to_group: int) -> None:
        if may == "neither" or (may == "group" and to_user != -1):
            raise PermissionError(1, "Operation not permitted")
        give(descriptor, to_user, to_group)

    monkeypatch.setattr(os, "fchown", give_or_refuse)
    publish(file, b"new")
    found = file.stat()
    # What the group might do is for that group alone.
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (uid, gid, mode)


# --- who may read what is new ---


def write_everything(runs: Path) -> None:
    """Every kind of file that a command leaves in its folder."""
    with Storage(f"sqlite:///{runs}/tuner.db") as storage:
        storage.development.add("0" * 64, b"rows")  # SQLite's journals appear
        assert (runs / "tuner.db-wal").exists()
        inspect(runs)
    publish(runs / "artifacts" / "small-0" / "checkpoints" / "0.npz", b"checkpoint")
    artifact_store(runs / "artifacts").write("an id", io.BytesIO(b"uploaded"))
    with one_process_at_a_time(runs / "artifacts" / "rows.lock"):
        pass
    write_user(runs / "users.json", "ada", "viewer", "a long password")
    require_writable(runs / "export")
    publish(runs / "export" / "best.toml", b"exported")
    inspect(runs)


def inspect(runs: Path, folders: int = 0o700, files: int = 0o600) -> None:
    for path in [runs, *runs.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert oct(mode) == oct(folders if path.is_dir() else files), path


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


posix = pytest.mark.skipif(os.name != "posix", reason="no such modes here")


@posix
def test_what_a_command_makes_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o755)
    write_everything(tmp_path / "runs")


@posix
def test_a_folder_that_is_there_keeps_its_mode_and_its_database_is_private(
    tmp_path: Path, umask: int
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o755)
    Storage(f"sqlite:///{runs}/tuner.db").close()
    publish(runs / "artifacts" / "0.npz", b"checkpoint")
    assert stat.S_IMODE(runs.stat().st_mode) == 0o755
    assert stat.S_IMODE((runs / "tuner.db").stat().st_mode) == 0o600
    inspect(runs / "artifacts")


@posix
def test_a_folder_shared_on_purpose_is_shared_below(tmp_path: Path, umask: int) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o2770)
    Storage(f"sqlite:///{runs}/tuner.db").close()
    publish(runs / "artifacts" / "small-0" / "checkpoints" / "0.npz", b"checkpoint")
    artifact_store(runs / "artifacts").write("an id", io.BytesIO(b"uploaded"))
    inspect(runs, 0o2770, 0o660)


@posix
def test_an_export_elsewhere_is_for_whom_the_umask_says(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        require_writable(tmp_path / "best")
        publish(tmp_path / "best" / "best.toml", b"exported")
    finally:
        os.umask(before)
    inspect(tmp_path / "best", 0o755, 0o644)


def test_a_file_in_the_way_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    for folder in (tmp_path / "runs", tmp_path / "runs" / "artifacts"):
        with pytest.raises(OSError, match=r"exists|Not a directory"):
            make_folder(folder)
