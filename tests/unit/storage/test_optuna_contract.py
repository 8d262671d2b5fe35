"""Optuna's own tests of a storage, on ours: from the database, and with a study in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase

from tuner.storage.storage import Storage


class TestFromTheDatabase(StorageTestCase):
    @pytest.fixture
    def storage(self, database_url: str) -> Iterator[BaseStorage]:
        with Storage(database_url) as opened:
            yield opened.optuna

    # A storage has a thread and connections. It is opened by its URL and never sent.
    test_pickle_storage = None


class TestWithTheFirstStudyInMemory(StorageTestCase):
    """The first study is in memory as a coordinator has it, those made after it are not."""

    @pytest.fixture
    def storage(self, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseStorage]:
        with Storage(database_url) as opened:
            router = opened.optuna
            create = router.create_new_study

            def create_and_hold(
                directions: Sequence[StudyDirection], study_name: str | None = None
            ) -> int:
                study_id = create(directions, study_name)
                if router.in_memory is None:
                    opened.lease.take(study_id)
                return study_id

            monkeypatch.setattr(router, "create_new_study", create_and_hold)
            yield router
            opened.flush()

    test_pickle_storage = None  # as above

    # A trial has its coordinator's mark, a user attribute, from its first transaction on.
    test_create_new_trial = None
    test_set_trial_user_attr = None
