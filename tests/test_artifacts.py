"""Files that are whole, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuner.artifacts import publish


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
