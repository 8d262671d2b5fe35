"""One open database: studies and trials as Optuna's storage, and our own tables beside them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Self

import sqlalchemy as sa

from tuner.errors import StorageError
from tuner.storage import decisions, lease, queue
from tuner.storage.audit import AuditLog
from tuner.storage.batch import upsert
from tuner.storage.dashboard_note import replace_note
from tuner.storage.decisions import Decision, Decisions
from tuner.storage.development import DevelopmentFiles
from tuner.storage.engine import OPENING_SECONDS, Calls, explained, say_on_stderr
from tuner.storage.held_lease import HeldLease
from tuner.storage.lease import Leases
from tuner.storage.ledger import Ledger
from tuner.storage.optuna_storage import FencedStorage, open_database
from tuner.storage.private_optuna import models
from tuner.storage.queue import Queue
from tuner.storage.schema import look_at
from tuner.storage.splits import Splits
from tuner.storage.study_router import StudyRouter
from tuner.storage.transactions import Transactions
from tuner.storage.url import mask, parse_url


class Storage:
    """One open database.

    Attributes:
        url: Where it is, as SQLAlchemy takes it.
        optuna: Its studies and trials, as Optuna's storage.
        lease: The lease that this process holds; its study is held in memory.
        leases: Those of all studies.
        decisions: What each search decided.
        ledger: The openings of test splits.
        queue: The studies that wait for the service.
        development: The rows on which queued studies train.
        splits: Which sequences the test splits hold.
        audit: The changes through the web server.
    """

    def __init__(
        self,
        url: str,
        *,
        patience_seconds: float | None = 5.0,
        say: Callable[[str], None] = say_on_stderr,
        upgrade: bool = False,
        create: bool = True,
    ) -> None:
        """Opens the database and creates its schema if it is empty.

        Args:
            url: `sqlite:///PATH` or `postgresql://USER@HOST/DATABASE`.
            patience_seconds: How long a call is tried again during an outage; None for ever
                (a database that never answered is given up after ten seconds all the same).
            say: Takes the lines about outages.
            upgrade: Brings a schema of an older tuner or Optuna up to date, which else is refused.
            create: Makes the schema, its file and that one's folder if they are missing.

        Raises:
            StorageMissingError: They are missing, and are not to be made.
            StorageError: The URL is not usable, or the database is not one of ours.
        """
        self.url = url
        self._parsed = parse_url(url)
        opening = OPENING_SECONDS if patience_seconds is None else patience_seconds
        self._calls = Calls(opening, say)
        try:
            with explained(self._parsed):
                self._rdb: FencedStorage = self._calls.run(
                    open_database, self._parsed, self._calls, upgrade=upgrade, create=create
                )
        except BaseException:
            self._calls.close()
            raise
        self._calls.patience_seconds = patience_seconds
        fence = self._rdb.fence
        self._transactions = Transactions(
            self._parsed, self._rdb.engine, self._calls, fence=fence.check
        )
        # Its methods are made from `BaseStorage`, which no type checker sees.
        self.optuna = StudyRouter(self._rdb, self._calls)  # type: ignore[abstract]
        self.leases = Leases(self._transactions)
        self.lease = HeldLease(self.leases, fence, self.optuna, self._transactions)
        self.decisions = Decisions(self._transactions)
        self.ledger = Ledger(self._transactions)
        self.queue = Queue(self._transactions)
        self.development = DevelopmentFiles(self._transactions)
        self.splits = Splits(self._transactions)
        self.audit = AuditLog(self._transactions)

    @property
    def masked_url(self) -> str:
        """The URL without its password."""
        return mask(self.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the storage thread and its connections; the database stays as it is."""
        self._calls.close(self._rdb.dispose)

    def look(self) -> None:
        """Asks the database one question, beside whatever else waits for it.

        Raises:
            StorageError: It does not answer.
        """
        with explained(self._parsed):
            look_at(self._parsed)

    def give_up(self) -> None:
        """Stops waiting for an unavailable database: what waits for it fails with its error."""
        self._calls.give_up()

    # --- the study in memory, whose lease this process holds ---

    def flush(self) -> None:
        """Waits until everything that was written so far is committed.

        Raises:
            LeaseLostError: Another coordinator took over.
            StorageError: The database is unavailable, and `give_up` was called.
        """
        study = self.optuna.in_memory
        if study is not None:
            with explained(self._parsed):
                study.flush()

    def together(self) -> AbstractContextManager[None]:
        """A block whose writes to the study are committed together, or none of them."""
        study = self.optuna.in_memory
        return contextlib.nullcontext() if study is None else study.together()

    def record_decision(self, decision: Decision) -> None:
        """Writes a decision with the study's trials.

        Raises:
            LeaseLostError: Another coordinator took over.
        """
        study = self.optuna.in_memory
        if study is None:
            raise RuntimeError("decisions belong to a study whose lease is held")
        study.record_decision(decision)

    # --- studies, beside what Optuna's interface can ---

    def begin_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Sets an attribute of a study, without waiting for an unavailable database."""
        self._transactions.begin_call(lambda: self.optuna.set_study_user_attr(study_id, key, value))

    def begin_note(self, study_id: int, markdown: str) -> Future[None]:
        """Replaces the note that Optuna's dashboard shows with a study, also without waiting."""
        return self._transactions.begin(
            lambda connection: replace_note(connection, study_id, markdown)
        )

    def rename_study(self, study_id: int, name: str) -> bool:
        """Gives a study another name; False if another study has it."""
        table = models.StudyModel.__table__
        rename = table.update().where(table.c.study_id == study_id).values(study_name=name)
        try:
            self._transactions.run(lambda connection: connection.execute(rename))
        except StorageError as error:
            if isinstance(error.__cause__, sa.exc.IntegrityError):
                return False
            raise
        self.optuna.forget_names()
        return True

    def set_user_attrs_unless_live(self, study_id: int, attributes: Mapping[str, Any]) -> None:
        """Sets attributes of a study that no coordinator runs, all of them or none.

        Raises:
            StudyInUseError: A live coordinator holds the lease; nothing was written.
        """
        rows = [
            {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
            for key, value in attributes.items()
        ]
        model = models.StudyUserAttributeModel
        self.leases.unless_live(
            study_id, lambda connection, _: upsert(connection, model, ("study_id", "key"), rows)
        )

    def forget(self, study_id: int) -> None:
        """Removes what our tables hold about a study; what outlives a study stays."""

        def remove(connection: sa.Connection) -> None:
            for table in (lease.table, decisions.table, queue.table):
                connection.execute(table.delete().where(table.c.study_id == study_id))

        self._transactions.run(remove)
