"""The studies and where they stand, read once for many browsers that ask again and again."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from tuner.errors import TunerError
from tuner.every import Every
from tuner.search.attributes import RECORD_KEY
from tuner.search.status import StudyStatus, status
from tuner.search.study import list_names, load
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage

_MAX_AGE_SECONDS = 2.0  #: a status is shown again for so long


class Catalogue:
    """The status of every study, read at most every two seconds."""

    def __init__(self, storage: Storage, artifacts: Path) -> None:
        self._storage = storage
        self._artifacts = artifacts
        self._lock = threading.Lock()
        self._pause = Every(_MAX_AGE_SECONDS)  # between two looks at the storage
        self._open: dict[str, TunedStudy] = {}
        self._states: tuple[StudyStatus, ...] = ()

    def states(self) -> tuple[StudyStatus, ...]:
        """Every study of the tuner, by name."""
        with self._lock:
            if self._pause.is_due():
                self._pause.end_pause()  # where reading fails, the next one tries again
                self._states = tuple(self._read())
                self._pause.begin_pause()
            return self._states

    def forget(self) -> None:
        """Something was changed: the next look sees it."""
        with self._lock:
            self._pause.end_pause()

    def _read(self) -> Iterable[StudyStatus]:
        ids = {one.study_name: one._study_id for one in self._storage.optuna.get_all_studies()}
        names = list_names(self._storage)
        self._open = {name: tuned for name, tuned in self._open.items() if name in names}
        for name in names:
            tuned = self._open.get(name)
            # A pruner knows the brackets that it has computed: an opened study is kept open.
            if tuned is None or not self._is_the_same(tuned, ids.get(name)):
                try:
                    tuned = load(self._storage, name, artifacts_root=self._artifacts)
                except TunerError:  # deleted a moment ago, or stored by a later version
                    continue
                self._open[name] = tuned
            try:
                yield status(tuned)
            except KeyError:  # deleted a moment ago
                continue

    def _is_the_same(self, tuned: TunedStudy, study_id: int | None) -> bool:
        if tuned.id != study_id:
            return False
        record = self._storage.optuna.get_study_user_attrs(tuned.id).get(RECORD_KEY, {})
        return bool(record.get("folder") == tuned.key)
