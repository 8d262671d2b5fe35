"""What a coordinator drives its study with, and to whom it shows it."""

from __future__ import annotations

from typing import Protocol

from optuna.trial import FrozenTrial

from tuner.train import EpochResult, Train


class Workers(Protocol):
    """What trains: a cluster, or something cheap in a test."""

    @property
    def train(self) -> Train:
        """Trains a job; may raise WorkerLostError or TrainingPausedError."""
        ...

    def slots(self) -> int:
        """How many trainings can run at once, now."""
        ...

    def has_fast_bfloat16(self) -> bool:
        """Whether all who train multiply bfloat16 in hardware, as of now."""
        ...

    def pause(self) -> None:
        """Makes every running training end soon, with TrainingPausedError."""
        ...


class Watcher(Protocol):
    """Who shows what happens."""

    def epoch(self, trial: int, result: EpochResult) -> None: ...

    def trial_ended(self, trial: FrozenTrial) -> None: ...

    def say(self, message: str) -> None: ...

    def tick(self, running: int) -> None: ...
