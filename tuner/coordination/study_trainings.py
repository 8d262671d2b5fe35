"""A study as a cluster trains it: implements `tuner.cluster.trained_study.TrainedStudy`."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.artifacts import StudyArtifacts
from tuner.search.attributes import ENVIRONMENTS_KEY, RESUMED_FROM_KEY, RESUMED_KEY, WORKER_KEY
from tuner.search.tuned_study import TunedStudy
from tuner.train import Environment


@dataclass(frozen=True, slots=True)
class StudyTrainings:
    """The study's name and files; and who trains which trial is noted with it."""

    tuned: TunedStudy  #: the study

    @property
    def name(self) -> str:
        return self.tuned.name

    @property
    def development_sha256(self) -> str:
        return self.tuned.record.development_sha256

    @property
    def artifacts(self) -> StudyArtifacts:
        return self.tuned.artifacts

    def renews_lease(self) -> bool:
        return self.tuned.storage.lease.ensure()

    def note_worker(self, trial: int, *, worker: str, after: int, environment: Environment) -> None:
        trials = self.tuned.trials()
        if trial >= len(trials):  # a training by itself, of no trial
            return
        known = trials[trial]
        storage = self.tuned.storage.optuna
        storage.set_trial_user_attr(known._trial_id, WORKER_KEY, worker)
        # What was noted of epochs that are trained again is of no use.
        parts = [
            part
            for part in known.system_attrs.get(ENVIRONMENTS_KEY, ())
            if part["from_epoch"] <= after
        ]
        parts.append({"from_epoch": after + 1, **environment})
        storage.set_trial_system_attr(known._trial_id, ENVIRONMENTS_KEY, parts)
        if known.user_attrs.get(RESUMED_KEY):
            storage.set_trial_user_attr(known._trial_id, RESUMED_FROM_KEY, after)
