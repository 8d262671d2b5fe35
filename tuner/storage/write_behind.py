"""The study that this process drives: answered from memory, written behind in batches.

A coordinator is the only writer of its study. So every trial stands in memory, a read costs no
query, and what is written in a moment goes to the database in one transaction. The transaction
renews the lease (a coordinator that was replaced writes nothing) and counts the batch (one that
is tried again after a lost connection is not written twice). `flush` waits until everything so
far is committed; nothing that cannot be undone may happen before.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, InMemoryStorage, get_storage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite

from tuner.storage import decisions, lease
from tuner.storage.decisions import Decision
from tuner.storage.engine import Calls
from tuner.storage.lease import COORDINATOR_KEY
from tuner.storage.optuna_storage import FencedStorage, read_trials
from tuner.storage.tables import lock_for_writing


class DrivenStorage(BaseStorage):
    """What Optuna sees: the driven study from memory, every other one from the database."""

    def __init__(self, rdb: FencedStorage, calls: Calls) -> None:
        self._rdb = rdb
        self._calls = calls
        self._plain: BaseStorage = get_storage(rdb)
        self._driven: Driven | None = None

    def drive(self, study_id: int, token: str) -> None:
        """Takes a study into memory; this process holds its lease.

        Raises:
            LeaseLostError: It holds it no more.
        """
        self._driven = Driven(self._rdb, self._calls, study_id, token)

    def release(self) -> None:
        """Writes what is open, and answers from the database again."""
        driven, self._driven = self._driven, None
        if driven is not None:
            driven.flush()

    def forget_names(self) -> None:
        """A study was renamed, and Optuna's cache keeps names for ever: begins a new one."""
        self._plain = get_storage(self._rdb)

    @property
    def driven(self) -> Driven | None:
        return self._driven

    def _of_study(self, study_id: int) -> Driven | None:
        driven = self._driven
        return driven if driven is not None and driven.study_id == study_id else None

    def _of_trial(self, trial_id: int) -> Driven | None:
        driven = self._driven
        return driven if driven is not None and driven.holds(trial_id) else None

    # --- studies: few and small, always in the database ---

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        return self._plain.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        self._plain.delete_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._plain.set_study_user_attr(study_id, key, value)
        driven = self._of_study(study_id)
        if driven is not None:
            driven.memory.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._plain.set_study_system_attr(study_id, key, value)

    # A coordinator and its pruner ask for these four all the time.

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        driven = self._of_study(study_id)
        source = self._plain if driven is None else driven.memory
        return dict(source.get_study_user_attrs(study_id))

    def get_study_id_from_name(self, study_name: str) -> int:
        driven = self._driven
        if (
            driven is not None
            and driven.memory.get_study_name_from_id(driven.study_id) == study_name
        ):
            return driven.study_id
        return self._plain.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        driven = self._of_study(study_id)
        source = self._plain if driven is None else driven.memory
        return source.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        driven = self._of_study(study_id)
        source = self._plain if driven is None else driven.memory
        return source.get_study_directions(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._plain.get_study_system_attrs(study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        return self._plain.get_all_studies()

    # --- trials ---

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        driven = self._of_study(study_id)
        if driven is None or template_trial is not None:
            return self._plain.create_new_trial(study_id, template_trial)
        return driven.create_trial()

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        target = self._of_trial(trial_id) or self._plain
        target.set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        target = self._of_trial(trial_id) or self._plain
        return target.set_trial_state_values(trial_id, state, values)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        target = self._of_trial(trial_id) or self._plain
        target.set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        (self._of_trial(trial_id) or self._plain).set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        (self._of_trial(trial_id) or self._plain).set_trial_system_attr(trial_id, key, value)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        driven = self._of_trial(trial_id)
        return (
            self._plain.get_trial(trial_id) if driven is None else driven.memory.get_trial(trial_id)
        )

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        driven = self._of_study(study_id)
        source = self._plain if driven is None else driven.memory
        return source.get_all_trials(study_id, deepcopy, states)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return self._plain.get_trial_id_from_study_id_trial_number(study_id, trial_number)

    def remove_session(self) -> None:
        self._plain.remove_session()


class _Memory(InMemoryStorage):
    """Optuna's storage in memory, for one study whose ids are those of the database."""

    def __init__(self, study_id: int, name: str, directions: list[StudyDirection]) -> None:
        super().__init__()
        self._max_study_id = study_id - 1
        self.create_new_study(directions, name)

    def put(self, study_id: int, trial: FrozenTrial) -> None:
        """Takes a trial that stands in the database."""
        trials = self._studies[study_id].trials
        if trial.number != len(trials):
            raise RuntimeError(f"trial {trial.number} after {len(trials)} trials")
        trials.append(trial)
        self._trial_id_to_study_id_and_number[trial._trial_id] = (study_id, trial.number)
        self._studies[study_id].param_distribution |= trial.distributions
        self._update_cache(trial._trial_id, study_id)

    def replace(self, trial: FrozenTrial) -> None:
        self._set_trial(trial._trial_id, trial)

    def holds(self, trial_id: int) -> bool:
        return trial_id in self._trial_id_to_study_id_and_number


@dataclass(slots=True, kw_only=True)
class _Batch:
    """What waits to be written, by table."""

    params: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    user_attrs: dict[tuple[int, str], str] = field(default_factory=dict)
    system_attrs: dict[tuple[int, str], str] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: _Batch) -> None:
        self.params += other.params
        self.reports += other.reports
        self.values += other.values
        self.user_attrs |= other.user_attrs
        self.system_attrs |= other.system_attrs
        self.states += other.states
        self.decisions += other.decisions

    def write(self, connection: sa.Connection) -> None:
        for model, rows in (
            (models.TrialParamModel, self.params),
            (models.TrialIntermediateValueModel, self.reports),
            (models.TrialValueModel, self.values),
        ):
            if rows:
                connection.execute(model.__table__.insert(), rows)
        for model, attributes in (
            (models.TrialUserAttributeModel, self.user_attrs),
            (models.TrialSystemAttributeModel, self.system_attrs),
        ):
            upsert_attributes(connection, model, "trial_id", attributes)
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


def upsert_attributes(
    connection: sa.Connection, model: Any, owner: str, attributes: Mapping[tuple[int, str], str]
) -> None:
    """Writes attributes, as JSON by owner's id and key, over those that stand there.

    Args:
        connection: Where to.
        model: Optuna's model of the attributes: of studies or trials, user's or system's.
        owner: The column of the owner's id.
        attributes: What to write.
    """
    if not attributes:
        return
    upsert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    insert = upsert(model.__table__)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=[owner, "key"], set_={"value_json": insert.excluded.value_json}
        ),
        [
            {owner: its_id, "key": key, "value_json": text}
            for (its_id, key), text in attributes.items()
        ],
    )


class Driven:
    """The trials of one study in memory, and the batches that carry them to the database."""

    def __init__(self, rdb: FencedStorage, calls: Calls, study_id: int, token: str) -> None:
        self.study_id = study_id
        self._rdb = rdb
        self._calls = calls
        self._token = token
        self.memory = _Memory(
            study_id, rdb.get_study_name_from_id(study_id), rdb.get_study_directions(study_id)
        )
        self._lock = threading.RLock()  # while memory and batch change; never during a query
        self._written = threading.Condition(self._lock)
        self._batch = _Batch()
        self._own = threading.local()  # the batch of a thread that writes several changes together
        self._batches = 0  # written
        self._changes = 0  # taken into a batch
        self._changes_written = 0
        self._scheduled = False
        self._failure: BaseException | None = None
        self._last_known = -1  # highest trial id in memory
        for key, value in rdb.get_study_user_attrs(study_id).items():
            self.memory.set_study_user_attr(study_id, key, value)
        for trial in rdb._get_trials(study_id, None, set(), -1):  # noqa: SLF001 - our override
            self._put(trial)

    def holds(self, trial_id: int) -> bool:
        return self.memory.holds(trial_id)

    def _put(self, trial: FrozenTrial) -> None:
        self.memory.put(self.study_id, trial)
        self._last_known = max(self._last_known, trial._trial_id)

    # --- what needs the database's answer ---

    def create_trial(self) -> int:
        """A new RUNNING trial with this coordinator's mark; returns its id."""
        return self._calls.run(self._create_trial)

    def _create_trial(self) -> int:
        with self._rdb.engine.begin() as connection:
            lock_for_writing(connection)
            lease.renew(connection, self.study_id, self._token)
            studies = models.StudyModel.__table__
            connection.execute(  # whoever else adds a trial waits here: numbers are counted
                sa.select(studies.c.study_id)
                .where(studies.c.study_id == self.study_id)
                .with_for_update()
            )
            new = self._unknown_trials(connection)
            # The answer of an earlier try may have been lost on its way.
            made = next((one for one in new if self._is_untouched_and_ours(one)), None)
            if made is None:
                number = self.memory.get_n_trials(self.study_id) + len(new)
                made = self._insert_trial(connection, number)
                new.append(made)
        with self._lock:
            for trial in new:
                self._put(trial)
        return made._trial_id

    def _insert_trial(self, connection: sa.Connection, number: int) -> FrozenTrial:
        trials = models.TrialModel.__table__
        attributes = models.TrialUserAttributeModel.__table__
        started = datetime.now(UTC)
        trial_id = connection.execute(
            trials.insert()
            .values(
                study_id=self.study_id,
                number=number,
                state=TrialState.RUNNING,
                datetime_start=started.replace(tzinfo=None),
            )
            .returning(trials.c.trial_id)
        ).scalar_one()
        # Marked from its first transaction on, so that one whose coordinator died right after
        # it is adopted, and nobody else's ever is.
        mark = {"trial_id": trial_id, "key": COORDINATOR_KEY, "value_json": json.dumps(self._token)}
        connection.execute(attributes.insert().values(mark))
        return FrozenTrial(
            number=number,
            trial_id=trial_id,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=started.astimezone().replace(tzinfo=None),
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={COORDINATOR_KEY: self._token},
            system_attrs={},
            intermediate_values={},
        )

    def _is_untouched_and_ours(self, trial: FrozenTrial) -> bool:
        mine = trial.user_attrs.get(COORDINATOR_KEY) == self._token
        return mine and trial.state == TrialState.RUNNING and not trial.params

    def _unknown_trials(self, connection: sa.Connection) -> list[FrozenTrial]:
        trials = models.TrialModel.__table__
        newer = (trials.c.trial_id > self._last_known) & (trials.c.study_id == self.study_id)
        if connection.execute(sa.select(trials.c.trial_id).where(newer).limit(1)).first() is None:
            return []
        return read_trials(connection, newer)

    def look_at_others(self, connection: sa.Connection) -> None:
        """Takes in what others do: a new budget, trials that they enqueued or run themselves."""
        attributes = models.StudyUserAttributeModel.__table__
        for key, text in connection.execute(
            sa.select(attributes.c.key, attributes.c.value_json).where(
                attributes.c.study_id == self.study_id
            )
        ):
            self.memory.set_study_user_attr(self.study_id, key, json.loads(text))
        trials = models.TrialModel.__table__
        theirs = [
            trial._trial_id
            for trial in self.memory.get_all_trials(self.study_id, deepcopy=False)
            if not trial.state.is_finished() and COORDINATOR_KEY not in trial.user_attrs
        ]
        changed = self._unknown_trials(connection)
        if theirs:
            changed += read_trials(connection, trials.c.trial_id.in_(theirs))
        with self._lock:
            for trial in changed:
                if not self.holds(trial._trial_id):
                    self._put(trial)
                elif COORDINATOR_KEY not in self.memory.get_trial(trial._trial_id).user_attrs:
                    self.memory.replace(trial)

    def _take_waiting(self, trial_id: int) -> bool:
        """Makes a WAITING trial RUNNING, unless another process was faster."""
        trials = models.TrialModel.__table__
        started = datetime.now(UTC).replace(tzinfo=None)

        def take() -> tuple[bool, FrozenTrial]:
            with self._rdb.engine.begin() as connection:
                lock_for_writing(connection)
                lease.renew(connection, self.study_id, self._token)
                taken = connection.execute(
                    trials.update()
                    .where(trials.c.trial_id == trial_id, trials.c.state == TrialState.WAITING)
                    .values(state=TrialState.RUNNING, datetime_start=started)
                )
                (now_it_is,) = read_trials(connection, trials.c.trial_id == trial_id)
                return taken.rowcount == 1, now_it_is

        taken, trial = self._calls.run(take)
        with self._lock:
            self.memory.replace(trial)
        return taken

    # --- what is written behind ---

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        with self._change() as batch:
            self.memory.set_trial_param(trial_id, param_name, param_value_internal, distribution)
            batch.params.append(
                {
                    "trial_id": trial_id,
                    "param_name": param_name,
                    "param_value": param_value_internal,
                    "distribution_json": _distribution_json(distribution),
                }
            )

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        stored = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr
        with self._change() as batch:
            if step in self.memory.get_trial(trial_id).intermediate_values:
                return  # the first of two reports of one step is kept, as Optuna does
            self.memory.set_trial_intermediate_value(trial_id, step, intermediate_value)
            value, kind = stored(intermediate_value)
            batch.reports.append(
                {
                    "trial_id": trial_id,
                    "step": step,
                    "intermediate_value": value,
                    "intermediate_value_type": kind,
                }
            )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        with self._change() as batch:
            self.memory.set_trial_user_attr(trial_id, key, value)
            batch.user_attrs[trial_id, key] = json.dumps(value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        with self._change() as batch:
            self.memory.set_trial_system_attr(trial_id, key, value)
            batch.system_attrs[trial_id, key] = json.dumps(value)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if state == TrialState.RUNNING:
            return self._take_waiting(trial_id)
        with self._change() as batch:
            self.memory.set_trial_state_values(trial_id, state, values)
            for objective, value in enumerate(values or ()):
                stored, kind = models.TrialValueModel.value_to_stored_repr(value)
                batch.values.append(
                    {
                        "trial_id": trial_id,
                        "objective": objective,
                        "value": stored,
                        "value_type": kind,
                    }
                )
            ended = datetime.now(UTC).replace(tzinfo=None) if state.is_finished() else None
            batch.states.append({"its_id": trial_id, "its_state": state, "its_end": ended})
        return True

    def record_decision(self, decision: Decision) -> None:
        with self._change() as batch:
            batch.decisions.append({"study_id": self.study_id, **asdict(decision)})

    # --- batches ---

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block whose changes, by this thread, are committed together, or none of them.

        A block inside another is a part of that one.
        """
        if getattr(self._own, "batch", None) is not None:
            yield
            return
        self._own.batch = _Batch()
        try:
            yield
        finally:
            batch = self._own.batch
            self._own.batch = None
            with self._change() as shared:
                shared.add(batch)

    @contextlib.contextmanager
    def _change(self) -> Iterator[_Batch]:
        with self._lock:
            self._raise_failure()
            own: _Batch | None = getattr(self._own, "batch", None)
            yield self._batch if own is None else own
            if own is not None:
                return
            self._changes += 1
            if not self._scheduled:
                self._scheduled = True
                self._calls.submit(self._take_batch).add_done_callback(self._note_failure)

    def _take_batch(self) -> None:
        with self._lock:
            self._scheduled = False
            batch, self._batch = self._batch, _Batch()
            until = self._changes
        self._calls.persist(lambda: self._write(batch))
        with self._lock:
            self._batches += 1
            self._changes_written = until
            self._written.notify_all()

    def _write(self, batch: _Batch) -> None:
        with self._rdb.engine.begin() as connection:
            lock_for_writing(connection)
            if lease.count_batch(connection, self.study_id, self._token, self._batches):
                batch.write(connection)
            # Else the commit of an earlier try went through, and only its answer was lost.

    def _note_failure(self, written: Future[None]) -> None:
        error = written.exception()
        if error is not None:
            with self._lock:
                self._failure = self._failure or error
                self._written.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Waits until everything so far is committed.

        Raises:
            LeaseLostError: Another coordinator took over; the rest will never be written.
            StorageError: The database is away, and nobody waits for it any more.
        """
        with self._lock:
            until = self._changes
            while self._changes_written < until:
                self._raise_failure()
                self._written.wait()


@lru_cache(maxsize=4096)
def _distribution_json(distribution: BaseDistribution) -> str:
    return distribution_to_json(distribution)
