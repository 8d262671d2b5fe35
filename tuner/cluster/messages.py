"""What the coordinator's side and a worker send to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tuner.errors import (
    EndReason,
)
from tuner.spec.architecture import ModelConfig
from tuner.spec.precision import Precision
from tuner.spec.spec import TrainingSettings
from tuner.train import EpochResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTask:
    """One attempt at training one trial: all that a worker gets, beside the development file."""

    attempt: str  #: unique, and the key of the Dask task; no other attempt's messages are believed
    events: str  #: topic on which the worker speaks
    orders: str  #: topic on which it listens
    config: ModelConfig
    seed: int
    trial: int
    rungs: tuple[int, ...]
    training: TrainingSettings
    precision: Precision
    threads: int
    development_file: str
    development_sha256: str
    checkpoint: bytes | None
    train_until: int  #: the epoch after which the first verdict is awaited


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """How an attempt ended."""

    ending: Literal["finished", "stopped", "paused"] | EndReason
    curve: tuple[EpochResult, ...]
    detail: str = ""
    best_weights: bytes | None = None  #: of a finished training
    checkpoint: bytes | None = None  #: of a paused one


def metadata_keys(sha256: str) -> list[str]:
    """Under which a coordinator leaves development rows on the scheduler."""
    return ["tuner-development", sha256]


@dataclass(frozen=True, slots=True)
class Unusable:
    """The checkpoint that an attempt was given cannot be used."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A worker built the network."""

    worker: str
    after: int  #: the epoch of the checkpoint from which it resumes; 0 if there was none
