"""What a cluster needs of the study that it trains."""

from __future__ import annotations

from typing import Protocol

from tuner.artifacts import StudyArtifacts
from tuner.train import Environment


class TrainedStudy(Protocol):
    """A study, as far as its trainings need it."""

    @property
    def name(self) -> str: ...

    @property
    def development_sha256(self) -> str:
        """Of the development file."""
        ...

    @property
    def artifacts(self) -> StudyArtifacts:
        """Where checkpoints and weights are kept."""
        ...

    def renews_lease(self) -> bool:
        """Whether this process still runs the study; raises LeaseLostError if another does."""
        ...

    def note_worker(self, trial: int, *, worker: str, after: int, environment: Environment) -> None:
        """Notes who trains a trial, after which epoch it resumed (0: from the start), and where."""
        ...
