"""Optuna's storage on our engine, every write of it fenced by the lease."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Container
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, orm

from tuner.artifacts import make_folder
from tuner.storage.engine import Calls, SilenceTimer, configure, engine_arguments
from tuner.storage.lease import Fence
from tuner.storage.private_optuna import CALLED_BY_THE_CACHE, models
from tuner.storage.schema import make_current, publish_empty_database, require_tables
from tuner.storage.url import is_sqlite


class FencedStorage(RDBStorage):
    """Optuna's storage on the one storage thread, with back-off and the lease's fence."""

    def __init__(self, url: sa.URL, calls: Calls) -> None:
        self._calls = calls
        self.fence = Fence()
        # What `RDBStorage` sets, but for the look at the schema's version: `open_database` had
        # it, and Optuna's imports Alembic, a tenth of a second of each verb.
        self.url = url.render_as_string(hide_password=False)
        self.engine_kwargs = engine_arguments(url)
        self.skip_compatibility_check = True
        self.heartbeat_interval = self.grace_period = None
        self.heartbeat_stale_trial_callback = self.failed_trial_callback = None
        self.engine = sa.create_engine(self.url, **self.engine_kwargs)
        self.scoped_session = orm.scoped_session(orm.sessionmaker(bind=self.engine))
        configure(self.engine)
        self._silence = None if is_sqlite(self.engine) else SilenceTimer(self.engine)
        if self._silence is not None:
            calls.each_try = self._silence.each_try
        event.listen(self.scoped_session, "after_flush", _note_flush)
        event.listen(self.scoped_session, "do_orm_execute", _note_bulk_write)
        event.listen(self.scoped_session, "before_commit", self._refuse_a_stale_writer)

    def dispose(self) -> None:
        # SQLAlchemy holds who listens to a kind of session for ever.
        event.remove(self.scoped_session, "before_commit", self._refuse_a_stale_writer)
        self.remove_session()
        self.engine.dispose()
        if self._silence is not None:
            self._silence.close()

    def _refuse_a_stale_writer(self, session: orm.Session) -> None:
        session.flush()
        if session.info.pop("wrote", False) and self.fence.token is not None:
            self.fence.check(session.connection())

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """Reads trials as Optuna does, but in six plain queries."""
        trials = models.TrialModel.__table__
        wanted = trials.c.trial_id > trial_id_greater_than
        if included_trial_ids:
            wanted |= trials.c.trial_id.in_(included_trial_ids)
        wanted &= trials.c.study_id == study_id
        if states is not None:
            wanted &= trials.c.state.in_([state for state in TrialState if state in states])
        with self.engine.connect() as connection:
            # One snapshot: a coordinator may write between two of the queries.
            sqlite = is_sqlite(self.engine)
            connection.exec_driver_sql(
                "BEGIN" if sqlite else "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
            )
            found = read_trials(connection, wanted)
            if not found:
                studies = models.StudyModel.__table__
                known = sa.select(studies.c.study_id).where(studies.c.study_id == study_id)
                if connection.scalar(known) is None:
                    raise KeyError(f"No study with study_id {study_id} exists.")
            return found


def on_the_storage_thread(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a method of Optuna's on the storage thread."""

    @wraps(method)
    def call(self: FencedStorage, *args: Any, **kwargs: Any) -> Any:
        return self._calls.run(method, self, *args, **kwargs)

    return call


for _name in (*BaseStorage.__abstractmethods__, *CALLED_BY_THE_CACHE):
    setattr(FencedStorage, _name, on_the_storage_thread(getattr(FencedStorage, _name)))


def read_trials(connection: sa.Connection, wanted: sa.ColumnElement[bool]) -> list[FrozenTrial]:
    """The trials that a condition on Optuna's table of trials selects, by number."""
    trials = models.TrialModel.__table__

    def parts(model: Any) -> dict[int, list[Any]]:
        table = model.__table__
        query = sa.select(table).join(trials, trials.c.trial_id == table.c.trial_id).where(wanted)
        query = query.order_by(*table.primary_key.columns)
        found = defaultdict(list)
        for row in connection.execute(query):
            found[row.trial_id].append(row)
        return found

    rows = connection.execute(sa.select(trials).where(wanted).order_by(trials.c.number)).all()
    values = parts(models.TrialValueModel)
    params = parts(models.TrialParamModel)
    reports = parts(models.TrialIntermediateValueModel)
    user_attrs = parts(models.TrialUserAttributeModel)
    system_attrs = parts(models.TrialSystemAttributeModel)
    read_value = models.TrialValueModel.stored_repr_to_value
    read_report = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
    found = []
    for row in rows:
        its = row.trial_id
        by_objective = sorted(values.get(its, ()), key=lambda value: value.objective)
        in_order = params.get(its, ())
        distributions = {
            param.param_name: _distribution(param.distribution_json) for param in in_order
        }
        found.append(
            FrozenTrial(
                number=row.number,
                state=row.state,
                value=None,
                values=[read_value(one.value, one.value_type) for one in by_objective] or None,
                datetime_start=_local_time(row.datetime_start),
                datetime_complete=_local_time(row.datetime_complete),
                params={
                    param.param_name: distributions[param.param_name].to_external_repr(
                        param.param_value
                    )
                    for param in in_order
                },
                distributions=distributions,
                user_attrs=_attributes(user_attrs.get(its, ())),
                system_attrs=_attributes(system_attrs.get(its, ())),
                intermediate_values={
                    one.step: read_report(one.intermediate_value, one.intermediate_value_type)
                    for one in reports.get(its, ())
                },
                trial_id=its,
            )
        )
    return found


def _attributes(rows: Collection[Any]) -> dict[str, Any]:
    return {row.key: json.loads(row.value_json) for row in rows}


@functools.lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _local_time(utc: datetime | None) -> datetime | None:
    """Optuna's date-times: naive UTC in the database, naive local time in a trial."""
    return None if utc is None else utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def open_database(
    url: sa.URL, calls: Calls, *, upgrade: bool = False, create: bool = True
) -> FencedStorage:
    """Opens a database, and creates its schema where it is empty.

    Many processes may open an empty database at once, where `create_all` races: SQLite's file
    is published whole, PostgreSQL's tables are created under a lock.

    Args:
        url: Where it is.
        calls: Runs what the storage is asked.
        upgrade: Brings a schema of an older tuner or Optuna up to date.
        create: Makes what is missing: folder, file, tables.

    Raises:
        StorageMissingError: It holds no tables of the tuner, and none are to be made.
        StorageError: The schema is of a newer version, or of an older one and is not to be changed.
    """
    if not create:
        require_tables(url)
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database))
        if not path.exists():
            make_folder(path.parent)
            publish_empty_database(path)
    make_current(url, upgrade=upgrade)
    return FencedStorage(url, calls)


def _note_flush(session: orm.Session, _context: object) -> None:
    session.info["wrote"] = True


def _note_bulk_write(state: orm.ORMExecuteState) -> None:
    if state.is_insert or state.is_update or state.is_delete:
        state.session.info["wrote"] = True
