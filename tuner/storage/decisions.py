"""The decisions of a search, in the order in which they were taken.

The order says what each decision saw: samplers look at the trials asked for and told before,
pruners at the verdicts before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

import sqlalchemy as sa

from tuner.storage.tables import metadata
from tuner.storage.transactions import Transactions

table = sa.Table(
    "tuner_decisions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("study_id", sa.Integer, nullable=False, index=True),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=True),
    sa.Column("verdict", sa.String(16), nullable=True),
)


DecisionKind: TypeAlias = Literal["ask", "rung", "tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One ask, rung verdict or tell."""

    trial: int  #: its number
    kind: DecisionKind  #: a new trial, a look at a rung, or an end
    epoch: int | None  #: of the rung, or the last one of a trial that ended; 1-based
    verdict: str | None  #: "go", "prune" or "audit" at a rung, the trial's state at the end


class Decisions:
    """The decisions in one database; `WriteBehindStudy` writes them with its trials."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def of(self, study_id: int) -> tuple[Decision, ...]:
        """All decisions of a study, in the order in which they were taken."""
        query = (
            sa.select(*(table.c[field.name] for field in dataclasses.fields(Decision)))
            .where(table.c.study_id == study_id)
            .order_by(table.c.id)
        )
        rows = self._transactions.run(lambda one: one.execute(query).mappings().all())
        return tuple(Decision(**row) for row in rows)
