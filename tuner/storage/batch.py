"""Changes of trials and decisions that are written to Optuna's tables and ours in one go."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import TrialState
from sqlalchemy.dialects import postgresql, sqlite

from tuner.storage import decisions
from tuner.storage.decisions import Decision
from tuner.storage.private_optuna import models

#: Optuna's tables of what belongs to a trial; the column that with the trial's id names a row.
_PARTS: dict[Any, str] = {
    models.TrialParamModel: "param_name",
    models.TrialIntermediateValueModel: "step",
    models.TrialValueModel: "objective",
    models.TrialUserAttributeModel: "key",
    models.TrialSystemAttributeModel: "key",
}


@dataclass(slots=True)
class Batch:
    """What waits to be written; a later change of the same thing takes the place of an earlier."""

    #: By table: by trial's id and the table's second key, a row.
    parts: dict[Any, dict[tuple[int, Any], dict[str, Any]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    states: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def set_param(
        self, trial_id: int, name: str, internal: float, distribution: BaseDistribution
    ) -> None:
        self._put(
            models.TrialParamModel,
            trial_id,
            name,
            param_value=internal,
            distribution_json=_distribution_json(distribution),
        )

    def set_intermediate_value(self, trial_id: int, step: int, value: float) -> None:
        model = models.TrialIntermediateValueModel
        stored, kind = model.intermediate_value_to_stored_repr(value)
        self._put(model, trial_id, step, intermediate_value=stored, intermediate_value_type=kind)

    def set_value(self, trial_id: int, objective: int, value: float) -> None:
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        self._put(models.TrialValueModel, trial_id, objective, value=stored, value_type=kind)

    def set_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._put(models.TrialUserAttributeModel, trial_id, key, value_json=json.dumps(value))

    def set_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._put(models.TrialSystemAttributeModel, trial_id, key, value_json=json.dumps(value))

    def set_state(self, trial_id: int, state: TrialState) -> None:
        ended = datetime.now(UTC).replace(tzinfo=None) if state.is_finished() else None
        self.states.append({"its_id": trial_id, "its_state": state, "its_end": ended})

    def add_decision(self, study_id: int, decision: Decision) -> None:
        self.decisions.append({"study_id": study_id, **asdict(decision)})

    def _put(self, model: Any, trial_id: int, second: Any, **columns: Any) -> None:
        row = {"trial_id": trial_id, _PARTS[model]: second, **columns}
        self.parts[model][trial_id, second] = row

    def add(self, later: Batch) -> None:
        """Takes in the changes of a batch that was begun after this one."""
        for model, rows in later.parts.items():
            self.parts[model] |= rows
        self.states += later.states
        self.decisions += later.decisions

    def write(self, connection: sa.Connection) -> None:
        """Writes everything, on a connection in a transaction."""
        for model, second in _PARTS.items():
            upsert(connection, model, ("trial_id", second), self.parts[model].values())
        if self.states:
            trials = models.TrialModel.__table__
            connection.execute(
                trials.update()
                .where(trials.c.trial_id == sa.bindparam("its_id"))
                .values(state=sa.bindparam("its_state"), datetime_complete=sa.bindparam("its_end")),
                self.states,
            )
        if self.decisions:
            connection.execute(decisions.table.insert(), self.decisions)


def upsert(
    connection: sa.Connection,
    model: Any,
    key: tuple[str, ...],
    rows: Collection[Mapping[str, Any]],
) -> None:
    """Writes rows over those that have the same key.

    Args:
        connection: Where to.
        model: Optuna's model of the table.
        key: Columns that identify a row.
        rows: All with the same columns.
    """
    if not rows:
        return
    statement = _upsert(connection.dialect.name, model, key, tuple(next(iter(rows))))
    connection.execute(statement, [dict(row) for row in rows])


@lru_cache  # building it costs as much CPU as running it
def _upsert(dialect: str, model: Any, key: tuple[str, ...], columns: tuple[str, ...]) -> sa.Insert:
    insert = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(model.__table__)
    changed = {name: insert.excluded[name] for name in columns if name not in key}
    return insert.on_conflict_do_update(index_elements=key, set_=changed)


@lru_cache(maxsize=4096)
def _distribution_json(distribution: BaseDistribution) -> str:
    return distribution_to_json(distribution)
