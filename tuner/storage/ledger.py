"""The ledger: every opening of a test split, and who opened it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One opening of a test split."""

    id: int
    opened_at: str
    opened_by: str
    study: str
    study_key: str  #: unique to the study, and never used again
    trial: int
    config_hash: str
    spec_hash: str
    split_id: str
    report: dict[str, Any] | None  #: None where the evaluation never finished
