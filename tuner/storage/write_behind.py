"""A study in memory: answered without a query, written behind in batches.

A coordinator is the only writer of its study. So every trial is in memory, a read costs no query,
and what is written in a moment goes to the database in one transaction. The transaction renews
the lease (a coordinator that was replaced writes nothing) and counts the batch (one that is tried
again after a lost connection is not written twice). `flush` waits until everything so far is
committed; nothing that cannot be undone may happen before.

Why: `docs/decisions.md#why-does-the-coordinator-keep-its-study-in-memory-and-write-behind`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from tuner.storage import lease
from tuner.storage.batch import Batch
from tuner.storage.decisions import Decision
from tuner.storage.engine import Calls
from tuner.storage.lease import COORDINATOR_KEY
from tuner.storage.optuna_storage import FencedStorage, read_trials
from tuner.storage.private_optuna import StudyInMemory, models
from tuner.storage.tables import lock_for_writing


class WriteBehindStudy(StudyInMemory):
    """One study, with the ids of the database: what reads is Optuna's, what writes is here."""

    def __init__(
        self,
        rdb: FencedStorage,
        database: BaseStorage,
        calls: Calls,
        study_id: int,
        token: str,
    ) -> None:
        """Reads a study whose lease this process took.

        Args:
            rdb: The database.
            database: The same behind Optuna's cache.
            calls: Runs what needs the database.
            study_id: The study.
            token: Of the lease.
        """
        super().__init__(
            study_id, rdb.get_study_name_from_id(study_id), rdb.get_study_directions(study_id)
        )
        self._rdb = rdb
        self._database = database
        self._calls = calls
        self._token = token
        # Optuna's `_lock` guards what is here, too. It is never held during a query.
        self._written = threading.Condition(self._lock)
        self._batch = Batch()
        self._own = threading.local()  # the batch of a thread that writes several changes together
        self._batches = 0  # written
        self._changes = 0  # taken into a batch
        self._changes_written = 0
        self._scheduled = False
        self._failure: BaseException | None = None
        self._last_known = -1  # highest trial id in memory
        for key, value in rdb.get_study_user_attrs(study_id).items():
            super().set_study_user_attr(study_id, key, value)
        for trial in rdb._get_trials(study_id, None, set(), -1):  # noqa: SLF001 - our override
            self.put(trial)

    def put(self, trial: FrozenTrial) -> None:
        super().put(trial)
        self._last_known = max(self._last_known, trial._trial_id)

    # --- the study: its attributes are few and small, so each is written at once ---

    def delete_study(self, study_id: int) -> None:
        self.flush()
        self._database.delete_study(study_id)
        super().delete_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._database.set_study_user_attr(study_id, key, value)
        super().set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._database.set_study_system_attr(study_id, key, value)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        # Others write these, as the dashboard its notes, and a coordinator hardly reads them.
        return self._database.get_study_system_attrs(study_id)

    # --- what needs the database's answer ---

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """A new RUNNING trial with this coordinator's mark, or one as its template."""
        if template_trial is None:
            return self._calls.run(self._create_trial)
        trial_id = self._database.create_new_trial(study_id, template_trial)
        self._calls.run(self._read_unknown_trials)
        return trial_id

    def _read_unknown_trials(self) -> None:
        with self._rdb.engine.begin() as connection:
            lock_for_writing(connection)  # one snapshot of SQLite's
            new = self._unknown_trials(connection)
        with self._lock:
            for trial in new:
                self.put(trial)

    def _create_trial(self) -> int:
        with self._rdb.engine.begin() as connection:
            lock_for_writing(connection)
            lease.renew(connection, self.study_id, self._token)
            studies = models.StudyModel.__table__
            connection.execute(  # whoever adds a trial waits here: numbers are counted
                sa.select(studies.c.study_id)
                .where(studies.c.study_id == self.study_id)
                .with_for_update()
            )
            new = self._unknown_trials(connection)
            # The answer of an earlier try may have been lost on its way.
            made = next((one for one in new if self._is_untouched_and_ours(one)), None)
            if made is None:
                number = self.get_n_trials(self.study_id) + len(new)
                made = self._insert_trial(connection, number)
                new.append(made)
        with self._lock:
            for trial in new:
                self.put(trial)
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
        # it is adopted, and no other process's ever is.
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
            super().set_study_user_attr(self.study_id, key, json.loads(text))
        trials = models.TrialModel.__table__
        theirs = [
            trial._trial_id
            for trial in self.get_all_trials(self.study_id, deepcopy=False)
            if not trial.state.is_finished() and COORDINATOR_KEY not in trial.user_attrs
        ]
        changed = self._unknown_trials(connection)
        if theirs:
            changed += read_trials(connection, trials.c.trial_id.in_(theirs))
        with self._lock:
            for trial in changed:
                if not self.holds("trial_id", trial._trial_id):
                    self.put(trial)
                elif COORDINATOR_KEY not in self.get_trial(trial._trial_id).user_attrs:
                    self.replace(trial)

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
            self.replace(trial)
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
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
            batch.set_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        with self._change() as batch:
            super().set_trial_intermediate_value(trial_id, step, intermediate_value)
            batch.set_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        with self._change() as batch:
            super().set_trial_user_attr(trial_id, key, value)
            batch.set_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        with self._change() as batch:
            super().set_trial_system_attr(trial_id, key, value)
            batch.set_system_attr(trial_id, key, value)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if state == TrialState.RUNNING:
            self.check_trial_is_updatable(trial_id, self.get_trial(trial_id).state)
            return self._take_waiting(trial_id)
        with self._change() as batch:
            super().set_trial_state_values(trial_id, state, values)
            for objective, value in enumerate(values or ()):
                batch.set_value(trial_id, objective, value)
            batch.set_state(trial_id, state)
        return True

    def record_decision(self, decision: Decision) -> None:
        with self._change() as batch:
            batch.add_decision(self.study_id, decision)

    # --- batches ---

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block whose changes, by this thread, are committed together, or none of them.

        A block inside another is a part of that one.
        """
        if getattr(self._own, "batch", None) is not None:
            yield
            return
        self._own.batch = Batch()
        try:
            yield
        finally:
            batch = self._own.batch
            self._own.batch = None
            with self._change() as shared:
                shared.add(batch)

    @contextlib.contextmanager
    def _change(self) -> Iterator[Batch]:
        with self._lock:
            self._raise_failure()
            own: Batch | None = getattr(self._own, "batch", None)
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
            batch, self._batch = self._batch, Batch()
            until = self._changes
        self._calls.persist(lambda: self._write(batch))
        with self._lock:
            self._batches += 1
            self._changes_written = until
            self._written.notify_all()

    def _write(self, batch: Batch) -> None:
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
            StorageError: The database is unavailable, and `Calls.give_up` was called.
        """
        with self._lock:
            until = self._changes
            while self._changes_written < until:
                self._raise_failure()
                self._written.wait()
