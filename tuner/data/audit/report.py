"""The whole audit of a source, and the short one that is told before a study runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.artifacts import publish
from tuner.data.audit.census import Census, census
from tuner.data.audit.packages import require_packages
from tuner.data.audit.shortcuts import Shortcut, fit_shortcuts
from tuner.data.audit.twins import SPLITS, TWIN, NearTwins, near_twins
from tuner.data.development import DevelopmentData
from tuner.data.identity import DataIdentity
from tuner.data.prepare import AuditRows, read_for_audit
from tuner.errors import SetupError, counted
from tuner.metrics import Metrics, measure

if TYPE_CHECKING:
    from tuner.spec.spec import DataSettings, SplitSettings

#: Of what is kept; another version counts again.
_VERSION = 1
_FOLDER = "audit"
#: Rows above which a short audit takes more than a few seconds.
MOST_ROWS_IN_SHORT = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A simple model, and what it is worth on validation rows."""

    name: str
    meaning: str  #: what it knows of a sequence
    validation: Metrics

    def to_document(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        found = self.validation
        return {
            "name": self.name,
            "meaning": self.meaning,
            "accuracy": found.accuracy,
            "accuracy_ci95": list(found.accuracy_ci95),
            "loss": found.loss,
            "loss_ci95": list(found.loss_ci95),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What is to be known of a source and its split before any network is trusted."""

    identity: DataIdentity
    split: SplitSettings
    twins: NearTwins
    shortcuts: tuple[Measured, ...]
    censuses: Mapping[str, Census]  #: by split
    left_out: int  #: rows whose sequence is there already, or has both labels

    def to_document(self) -> dict[str, Any]:
        """What `tuner data audit SPEC --json` prints."""
        return {
            "data": self.identity.check_document(),
            "split": self.split.model_dump(mode="json"),
            "split_id": self.identity.split_id,
            "near_twins": self.twins.to_document(),
            "shortcuts": [one.to_document() for one in self.shortcuts],
            "splits": {name: one.to_document() for name, one in self.censuses.items()},
            "repeated_rows_left_out": self.left_out,
        }


def audit(
    settings: DataSettings,
    *,
    folder: Path,
    artifacts: Path | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Audit:
    """Audits a source; of the test split it sees sequences, no labels.

    Args:
        settings: The study file's `[data]`.
        folder: Where the study file lies.
        artifacts: Where the clusters of a split by homology are kept; None: nowhere.
        say: Takes a line before each step that takes seconds.
        progress: Takes the part of the comparison of sequences that is done, 0..1.

    Raises:
        DataError: The source cannot be used.
        SetupError: SciPy or scikit-learn is missing.
    """
    require_packages("The audit", "scipy", "sklearn")
    say = say or (lambda _: None)
    say("Reading the data ...")
    identity, rows = read_for_audit(settings, folder=folder, artifacts=artifacts, say=say)
    say(f"Comparing {counted(identity.rows, 'sequence')} with each other ...")
    twins = near_twins(rows.development, rows.test_tokens, progress=progress)
    development = rows.development
    fitted = fit_shortcuts(
        development.training_tokens,
        development.training_labels,
        development.training_weights,
        say=say,
    )
    return Audit(
        identity=identity,
        split=settings.split,
        twins=twins,
        shortcuts=tuple(_measured(one, development) for one in fitted),
        censuses=_censuses(rows),
        left_out=rows.left_out,
    )


def _measured(shortcut: Shortcut, development: DevelopmentData) -> Measured:
    logits = shortcut.predict(development.validation_tokens)
    return Measured(
        name=shortcut.name,
        meaning=shortcut.meaning,
        validation=measure(development.validation_labels, logits),
    )


def _censuses(rows: AuditRows) -> dict[str, Census]:
    development = rows.development
    parts = (
        (development.training_tokens, development.training_labels),
        (development.validation_tokens, development.validation_labels),
        (rows.test_tokens, None),
    )
    return {name: census(*part) for name, part in zip(SPLITS, parts, strict=True)}


# --- in short ---


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortAudit:
    """What `tuner check` and `tuner launch` tell of near-twins."""

    development_pairs: int  #: near-twins among training and validation rows
    opposite_labels: float | None  #: their share with different labels, 0..1
    across_splits: int  #: near-twins of two splits
    validation_rows_with_twin: float  #: share with a near-twin in training, 0..1
    test_rows_with_twin: float  #: the same of the test split

    def to_document(self) -> dict[str, Any]:
        """What `tuner check --json` prints as `near_twins`."""
        return {name: getattr(self, name) for name in self.__slots__}

    def in_words(self) -> str:
        """One sentence."""
        opposite = ""
        if self.opposite_labels is not None:
            opposite = f", {100 * self.opposite_labels:.1f} % of them with opposite labels"
        return (
            f"{counted(self.development_pairs, 'pair')} of near-twins (5-mer similarity {TWIN} or "
            f"more) in training and validation{opposite}; {100 * self.test_rows_with_twin:.1f} % "
            "of the test rows have one in training"
        )


def short_audit(
    settings: DataSettings, identity: DataIdentity, *, folder: Path, artifacts: Path
) -> ShortAudit:
    """Counts near-twins, once for the same rows and split.

    Args:
        settings: The study file's `[data]`.
        identity: Of its data.
        folder: Where the study file lies.
        artifacts: What was counted is kept in `audit/` under it.

    Raises:
        DataError: The source can no longer be used.
        SetupError: SciPy is missing, or there are too many rows to count them in seconds.
    """
    kept = _kept_file(settings, identity, artifacts)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return ShortAudit(**json.loads(kept.read_text(encoding="utf-8")))
    if identity.rows > MOST_ROWS_IN_SHORT:
        raise SetupError(
            f"{counted(identity.rows, 'sequence')} take minutes to compare; "
            "`tuner data audit SPEC` does that."
        )
    require_packages("Counting near-twins", "scipy")
    _, rows = read_for_audit(settings, folder=folder, artifacts=artifacts)
    twins = near_twins(rows.development, rows.test_tokens)
    return keep(twins, settings, identity, artifacts)


def keep(
    twins: NearTwins, settings: DataSettings, identity: DataIdentity, artifacts: Path
) -> ShortAudit:
    """The short audit, kept for the next check or launch if it can be written."""
    found = ShortAudit(
        development_pairs=twins.development_pairs,
        opposite_labels=twins.opposite_labels,
        across_splits=twins.across_splits,
        validation_rows_with_twin=twins.twin_in_training[1],
        test_rows_with_twin=twins.twin_in_training[2],
    )
    content = json.dumps(found.to_document()).encode()
    with contextlib.suppress(OSError):  # it is counted again
        publish(_kept_file(settings, identity, artifacts), content, durable=False)
    return found


def _kept_file(settings: DataSettings, identity: DataIdentity, artifacts: Path) -> Path:
    """Named by all that rows and split follow from."""
    known = [_VERSION, identity.sha256, identity.split_id, settings.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return artifacts / _FOLDER / f"{digest}.json"
