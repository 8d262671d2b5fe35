"""What the user is told when something cannot be done.

Every message names the place, the value and the remedy. `tuner.cli.main` is the one
place that catches `TunerError`; nothing else turns an error into an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count in words: "1 epoch", "1,200 epochs"; of an irregular noun, its plural is given."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def ordinal(number: int) -> str:
    """A place in words: "1st", "2nd", "11th"."""
    teens = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def is_outage(error: BaseException) -> bool:
    """Whether the system failed to read or write: nothing is said about what stands in a file.

    No descriptors, no permission, no memory, a disk that fails: what is tried again may succeed.
    An `OSError` without a number is a library's word for content that it does not understand.
    """
    if isinstance(error, OSError):
        return error.errno is not None
    return isinstance(error, MemoryError)


def reason_of(error: BaseException) -> str:
    """The error in a few words: "Too many open files", "MemoryError"."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return (strerror or str(error) or type(error).__name__).splitlines()[0][:200]


class TunerError(Exception):
    """Something the user can mend. The message stands alone: no traceback is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake in a file of the user's."""

    file: str  #: the file as the user named it; "" for `--set` and the command line
    line: int | None  #: 1-based; None where no line can be named
    key: str  #: dotted key ("space.kernel_size") or column; "" for the whole file
    value: str  #: what stands there, shortened
    message: str  #: what is wrong, and what to write instead
    count: int = 1  #: mistakes of this kind in the file; place and value are those of the first

    def __str__(self) -> str:
        place = ":".join(part for part in (self.file, str(self.line or "")) if part)
        where = f"{self.key}: " if self.key else ""
        return f"{place}: {where}{self.message}" if place else f"{where}{self.message}"


class ProblemsError(TunerError):
    """Several mistakes in the user's files, all reported at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def to_document(self) -> list[dict[str, Any]]:
        """Plain values, ready for JSON: file, line, key, value, message and count of each."""
        return [asdict(problem) for problem in self.problems]


class SpecError(ProblemsError):
    """A study file that cannot be used."""


class DataError(ProblemsError):
    """A data file that cannot be used."""


class StorageError(TunerError):
    """The database cannot be reached or is not what it should be."""


class StorageMissingError(StorageError):
    """There is no database yet, or none of the tuner's, and only a look at it was asked for."""


class StudyInUseError(StorageError):
    """A live coordinator holds the study's lease."""


class StudyError(TunerError):
    """A study that does not exist, is in use, or does not fit what was asked."""


class BundleError(TunerError):
    """A bundle that is missing, damaged or of another version."""


class ClusterError(TunerError):
    """No workers, or no way to reach them."""


class SetupError(TunerError):
    """This process can neither train nor predict: TensorFlow or Keras is missing or unusable."""


class LeaseLostError(TunerError):
    """Another coordinator took this study over; nothing of this one was written since."""


#: Why a trial ended before its last epoch without being pruned by Hyperband.
EndReason = Literal["diverged", "out_of_memory", "over_time", "worker_lost"]


class TrialEndedError(Exception):
    """A trial that cannot go on. It ends PRUNED with a violated constraint; the study goes on."""

    def __init__(self, reason: EndReason, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class WorkerLostError(Exception):
    """The worker that trained a trial is gone; the same trial can go on elsewhere."""


class WorkerDiedEarlyError(WorkerLostError):
    """A worker died before it began to train: hardly the trial's fault, and yet it may be."""


class WorkerLeftError(WorkerLostError):
    """A worker gave its trial back, or the scheduler went away: no fault of the trial's."""


class TrainingPausedError(Exception):
    """A training stopped on request, with a checkpoint; the trial stays open and is resumed."""
