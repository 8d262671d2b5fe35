"""Optuna's storage in front of the database and of the one study that is held in memory."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from optuna.storages import BaseStorage, get_storage

from tuner.storage.engine import Calls
from tuner.storage.optuna_storage import FencedStorage
from tuner.storage.write_behind import WriteBehindStudy


class StudyRouter(BaseStorage):
    """Passes each call on: to the study in memory if it is about that one, else to the database.

    Every method of `BaseStorage` is made below, from its first parameter, which names what the
    call is about.
    """

    def __init__(self, rdb: FencedStorage, calls: Calls) -> None:
        self._rdb = rdb
        self._calls = calls
        self._database: BaseStorage = get_storage(rdb)
        self._in_memory: WriteBehindStudy | None = None

    @property
    def in_memory(self) -> WriteBehindStudy | None:
        """The study that is held in memory, if any."""
        return self._in_memory

    def hold(self, study_id: int, token: str) -> None:
        """Reads a study into memory; this process took its lease."""
        self._in_memory = WriteBehindStudy(self._rdb, self._database, self._calls, study_id, token)

    def release(self) -> None:
        """Writes what is open, and answers from the database again."""
        study, self._in_memory = self._in_memory, None
        if study is not None:
            study.flush()

    def forget_names(self) -> None:
        """A study was renamed, and Optuna's cache keeps names for ever: begins a new one."""
        self._database = get_storage(self._rdb)

    def _storage_of(self, parameter: str, value: Any) -> BaseStorage:
        study = self._in_memory
        return study if study is not None and study.holds(parameter, value) else self._database


def _routed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    _, *parameters = inspect.signature(method).parameters
    parameter = parameters[0] if parameters else ""

    @wraps(method, updated=())  # not its mark as an abstract one
    def call(self: StudyRouter, *args: Any, **kwargs: Any) -> Any:
        value = args[0] if args else kwargs.get(parameter)
        return getattr(self._storage_of(parameter, value), name)(*args, **kwargs)

    return call


for _name, _method in inspect.getmembers(BaseStorage, inspect.isfunction):
    if not _name.startswith("_"):
        setattr(StudyRouter, _name, _routed(_name, _method))
abc.update_abstractmethods(StudyRouter)  # type: ignore[type-abstract]
