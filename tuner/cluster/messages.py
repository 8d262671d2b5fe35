"""What the coordinator's side and a worker send to each other.

A `TrainingTask` travels to a worker and its `TrainingOutcome` back as Dask sends any task. In
between both sides speak on two topics, where Dask takes plain values only: messages travel as the
documents of `to_wire`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tuner.errors import EndReason
from tuner.train import EpochResult, TrainingJob

# --- the task ---


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTask:
    """One attempt at training one trial: all that a worker gets, beside the development file."""

    attempt: str  #: unique, and the key of the Dask task; no other attempt's messages are believed
    events: str  #: topic on which the worker speaks
    orders: str  #: topic on which it listens
    job: TrainingJob  #: what to train, and how
    threads: int  #: of the training, unless the worker has its own number
    development_file: str  #: where the coordinator has its rows; the worker may not see that
    development_sha256: str  #: of that file's bytes
    checkpoint: bytes | None  #: npz; None: from epoch 1
    train_until: int  #: the epoch after which the first verdict is awaited


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """How an attempt ended."""

    #: "stopped": told to, or given up by the scheduler; "paused": told to, or left without orders
    ending: Literal["finished", "stopped", "paused"] | EndReason
    curve: tuple[EpochResult, ...]  #: all epochs, those before the checkpoint included
    detail: str = ""  #: of an `EndReason`, for the user
    best_weights: bytes | None = None  #: of a finished training
    checkpoint: bytes | None = None  #: of a paused one


def metadata_keys(sha256: str) -> list[str]:
    """Under which a coordinator leaves development rows on the scheduler."""
    return ["tuner-development", sha256]


# --- what a worker says ---

#: Why a worker gave a trial back: it was asked to leave, or had to for the memory that the trial
#: takes, or cannot train at all.
LeaveReason = Literal["asked", "too large", "unfit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMessage:
    """Something that an attempt did."""

    attempt: str  #: its name in the task


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(WorkerMessage):
    """Its Dask task runs; more than once if Dask started it again, whose first worker died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointUnusable(WorkerMessage):
    """The checkpoint in its task cannot be used: it trains from epoch 1."""

    reason: str  #: the error, for the user


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(WorkerMessage):
    """Its network is built; if its worker dies from now on, the trial may be why."""

    worker: str  #: host and process, for the user
    after: int  #: the epoch of the checkpoint from which it resumes; 0 if there was none
    #: What computes there, see `tuner.cluster.environment`; of an earlier version {}.
    environment: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochTrained(WorkerMessage):
    """An epoch is complete; also each one of the checkpoint, when it is opened."""

    result: EpochResult  #: its losses and metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(WorkerMessage):
    """A checkpoint to keep."""

    content: bytes  #: npz


@dataclass(frozen=True, slots=True, kw_only=True)
class Left(WorkerMessage):
    """Its worker leaves, and gives the trial back."""

    reason: LeaveReason  #: see there
    detail: str = ""  #: of "unfit", for the user
    checkpoint: bytes | None = None  #: of the last completed epoch; None if it has trained none


# --- what the coordinator orders ---

STOP = -1  #: in place of an epoch: the attempt is to stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """How far each attempt may train."""

    pause: bool  #: every attempt is to save a checkpoint and end
    attempts: Mapping[str, int]  #: the epoch after which each waits to be told more, or `STOP`
    complete: bool  #: an attempt that is not named is to stop


# --- both as plain values ---

Message = WorkerMessage | Orders

_TYPES: dict[str, type[Message]] = {
    one.__name__: one
    for one in (Started, CheckpointUnusable, Opened, EpochTrained, CheckpointSaved, Left, Orders)
}


def to_wire(message: Message) -> dict[str, Any]:
    """The message as a document that msgpack takes, tagged with its type."""
    # The fields have a level of their own: Dask adds the worker's address beside the tag.
    return {"type": type(message).__name__, "fields": dataclasses.asdict(message)}


def from_wire(document: Mapping[str, Any]) -> Message | None:
    """The message that `to_wire` wrote; None if another version did, in words unknown here.

    Such a message is to be ignored. Messages may be lost at any time, which costs seconds:
    orders are repeated, and the outcome of a task has the whole curve. To refuse one would end a
    training because of something that this version has no use for.
    """
    kind = _TYPES.get(document.get("type", ""))
    if kind is None:
        return None
    names = {field.name for field in dataclasses.fields(kind)}
    fields = {name: value for name, value in document["fields"].items() if name in names}
    try:
        if kind is EpochTrained:
            fields["result"] = EpochResult.from_document(fields["result"])
        return kind(**fields)
    except (KeyError, TypeError):  # a field is missing
        return None
