"""What `tuner.storage.private_optuna` takes of Optuna is there, and nothing else is taken.

Where a test fails after an upgrade of Optuna, look at what its cache (`_CachedStorage`) calls of
the storage behind it, at how `InMemoryStorage` keeps a trial, and at the tables in
`optuna/storages/_rdb/models.py`; `test_optuna_contract.py` tells whether the rest still holds.
"""

from __future__ import annotations

import inspect
import re

import optuna
from folders import ROOT
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._heartbeat import BaseHeartbeat

from tuner.storage.private_optuna import CALLED_BY_THE_CACHE, StudyInMemory


def test_private_modules_of_optuna_are_imported_in_one_place() -> None:
    private = re.compile(
        r"(?:from|import) optuna(?:_dashboard)?(?:\.\w+)*\._|from optuna.* import _"
    )
    found = [
        path.name for path in (ROOT / "tuner").rglob("*.py") if private.search(path.read_text())
    ]
    assert found == ["private_optuna.py"]


def test_all_that_the_cache_calls_of_the_database_is_known() -> None:
    called = set(re.findall(r"self\._backend\.(\w+)\(", inspect.getsource(_CachedStorage)))
    promised = BaseStorage.__abstractmethods__ | BaseHeartbeat.__abstractmethods__
    inherited = {name for name in called if hasattr(BaseStorage, name)}
    assert called - promised - inherited <= set(CALLED_BY_THE_CACHE)
    assert "_get_trials" in called
    assert all(hasattr(RDBStorage, name) for name in CALLED_BY_THE_CACHE)


def test_a_study_in_memory_has_the_ids_of_the_database() -> None:
    directions = [optuna.study.StudyDirection.MINIMIZE]
    held = StudyInMemory(41, "demo", directions)
    trials = [optuna.trial.create_trial(value=value) for value in (0.5, 0.25)]
    for number, trial in enumerate(trials):
        trial.number, trial._trial_id = number, 1_000 + number
        held.put(trial)
    assert held.get_all_studies()[0]._study_id == 41
    assert [trial._trial_id for trial in held.get_all_trials(41)] == [1_000, 1_001]
    assert held.get_best_trial(41)._trial_id == 1_001
    replaced = optuna.trial.create_trial(value=0.125)
    replaced.number, replaced._trial_id = 0, 1_000
    held.replace(replaced)
    assert held.get_trial(1_000).value == 0.125
    for parameter, value in (("study_id", 41), ("study_name", "demo"), ("trial_id", 1_001)):
        assert held.holds(parameter, value)
    assert not held.holds("trial_id", 7)
    assert not held.holds("key", "demo")
