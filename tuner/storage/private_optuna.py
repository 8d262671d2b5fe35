"""What of Optuna's storages is used that Optuna does not promise to keep: here alone.

`tests/unit/storage/test_private_optuna.py` says what to do where it has moved. (Ids of studies and
trials, `_study_id` and `_trial_id`, are everywhere: every package around Optuna uses them.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.storages import InMemoryStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial

__all__ = ["CALLED_BY_THE_CACHE", "FrozenStudy", "StudyInMemory", "models"]

#: What Optuna's cache of a database calls beside the public interface.
CALLED_BY_THE_CACHE = (
    "_create_new_trial",
    "_get_trials",
    "_get_best_trial_id",
    "_set_trial_param",
    "_get_stale_trial_ids",
    "get_trial_id_from_study_id_trial_number",
)


class StudyInMemory(InMemoryStorage):
    """One study of a database in memory, with its ids there.

    Attributes:
        study_id: Of the study.
    """

    def __init__(self, study_id: int, name: str, directions: Sequence[StudyDirection]) -> None:
        super().__init__()
        self.study_id = study_id
        # What a call may be about, by the name of the parameter.
        self._held: Mapping[str, Mapping[Any, object]] = {
            "study_id": self._studies,
            "study_name": self._study_name_to_id,
            "trial_id": self._trial_id_to_study_id_and_number,
        }
        self._max_study_id = study_id - 1
        InMemoryStorage.create_new_study(self, directions, name)

    def holds(self, parameter: str, value: Any) -> bool:
        """Whether a "study_id", "study_name" or "trial_id" is of this study."""
        return value in self._held.get(parameter, ())

    def put(self, trial: FrozenTrial) -> None:
        """Takes in a trial that is in the database; under `_lock`."""
        its_study = self._studies[self.study_id]
        if trial.number != len(its_study.trials):
            raise RuntimeError(f"trial {trial.number} after {len(its_study.trials)} trials")
        its_study.trials.append(trial)
        self._trial_id_to_study_id_and_number[trial._trial_id] = (self.study_id, trial.number)
        its_study.param_distribution |= trial.distributions
        self._update_cache(trial._trial_id, self.study_id)

    def replace(self, trial: FrozenTrial) -> None:
        """Replaces a trial by what the database has; under `_lock`."""
        self._set_trial(trial._trial_id, trial)
