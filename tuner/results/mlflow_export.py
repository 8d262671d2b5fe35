"""The trials of a study as runs of an MLflow experiment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from optuna.trial import TrialState

from tuner.artifacts import CURVES_FILE, NETWORK_FILE, dashboard_folder
from tuner.commands import install_command
from tuner.errors import SetupError, TunerError
from tuner.results.runs import Run, Watch, runs_of
from tuner.search.tuned_study import TunedStudy

_STUDY_TAG = "tuner.study"  #: of a run: the study's key, which no other study has
_TRIAL_TAG = "tuner.trial"
_VERSION_TAG = "tuner.version"  #: `Run.version`; set last, so what was cut off has none
_STATUS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
    TrialState.RUNNING: "RUNNING",
}
_BATCH = 900  #: metrics in one request; MLflow takes 1,000
_PAGE = 1000  #: runs in one answer
#: What MLflow reads when it is imported: it sends no usage data from here, and an unreachable
#: server is given up after seconds and not minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowExport:
    """What an export wrote."""

    experiment: str  #: its name: the study's
    written: int  #: runs that are new
    replaced: int  #: runs of trials that went on since the last export
    unchanged: int  #: runs that an earlier export wrote


def export_to_mlflow(tuned: TunedStudy, uri: str, *, watch: Watch = iter) -> MlflowExport:
    """Writes each trial as a run; one that an earlier export wrote is left, or replaced.

    Args:
        tuned: The study.
        uri: As MLflow takes it: https://SERVER, sqlite:///FILE.
        watch: Shows the progress.

    Raises:
        SetupError: MLflow is not installed.
        TunerError: The server or the file cannot be used.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient  # noqa: PLC0415 - an extra
        from mlflow.exceptions import MlflowException  # noqa: PLC0415
    except ImportError as error:
        raise SetupError(
            f"MLflow cannot be imported here ({error}). Install the extra mlflow: "
            f"`{install_command('mlflow')}`."
        ) from error
    try:
        return _Export(MlflowClient(uri), tuned).write(watch)
    except (MlflowException, OSError) as error:
        user, at, _ = urlsplit(uri).netloc.rpartition("@")
        reason = str(error).replace(user + at, "").strip().splitlines()[0][:300]
        raise TunerError(
            f"--mlflow {_shown(uri)}: {reason}. What was written so far stays; the same command "
            "continues."
        ) from error


def _shown(uri: str) -> str:
    """The URI without user and password."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri


class _Export:
    """One export under way."""

    def __init__(self, client: Any, tuned: TunedStudy) -> None:
        self._client = client
        self._tuned = tuned

    def write(self, watch: Watch) -> MlflowExport:
        experiment = self._experiment()
        known = {int(run.data.tags[_TRIAL_TAG]): run for run in self._known_runs(experiment)}
        counts = {"written": 0, "replaced": 0, "unchanged": 0}
        for run in watch(runs_of(self._tuned)):
            old = known.get(run.trial)
            if old is not None and old.data.tags.get(_VERSION_TAG) == run.version:
                counts["unchanged"] += 1
                continue
            if old is not None:
                self._client.delete_run(old.info.run_id)
            self._write_run(experiment, run)
            counts["written" if old is None else "replaced"] += 1
        return MlflowExport(experiment=self._tuned.name, **counts)

    def _experiment(self) -> str:
        name = self._tuned.name
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name))
        if found.lifecycle_stage != "active":
            raise TunerError(
                f"MLflow has a deleted experiment {name!r}: restore it (mlflow experiments "
                f"restore --experiment-id {found.experiment_id}), or remove it for good (mlflow "
                "gc)."
            )
        return str(found.experiment_id)

    def _known_runs(self, experiment: str) -> Iterator[Any]:
        token = None
        while True:
            found = self._client.search_runs(
                [experiment],
                f"tags.`{_STUDY_TAG}` = '{self._tuned.key}'",
                max_results=_PAGE,
                page_token=token,
            )
            yield from found
            token = found.token
            if not token:
                return

    def _write_run(self, experiment: str, run: Run) -> None:
        from mlflow.entities import Metric, Param, RunTag  # noqa: PLC0415 - see above

        began = _milliseconds(run.started) or 0
        tags = {
            _STUDY_TAG: self._tuned.key,
            _TRIAL_TAG: str(run.trial),
            "tuner.state": run.state.name,
            "mlflow.note.content": run.note,
        }
        made = self._client.create_run(
            experiment, start_time=began, tags=tags, run_name=f"trial-{run.trial}"
        )
        identity = made.info.run_id
        metrics, at = [], float(began)
        for epoch, values in run.curve:
            at += 1000 * values.get("seconds", 0.0)
            metrics += [Metric(key, value, int(at), epoch.epoch) for key, value in values.items()]
        metrics += [Metric(key, value, int(at), 0) for key, value in run.figures.items()]
        parameters = [Param(name, str(value)) for name, value in run.parameters.items()]
        for start in range(0, len(parameters), 100):
            self._client.log_batch(identity, params=parameters[start : start + 100])
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(identity, metrics=metrics[start : start + _BATCH])
        self._write_artifacts(identity, run)
        self._client.set_terminated(identity, _STATUS[run.state], _milliseconds(run.ended))
        self._client.log_batch(identity, tags=[RunTag(_VERSION_TAG, run.version)])

    def _write_artifacts(self, identity: str, run: Run) -> None:
        """The study file, the drawing of the curves, the table of layers, kept weights."""
        artifacts = self._tuned.artifacts
        attached = dashboard_folder(artifacts.folder.parent)
        files = {
            name: attached / artifacts.identity(name, run.trial)
            for name in (CURVES_FILE, NETWORK_FILE)
        }
        files["weights.npz"] = artifacts.weights(run.trial)
        with tempfile.TemporaryDirectory(prefix="tuner-") as folder:
            (Path(folder) / f"trial-{run.trial}.toml").write_text(run.study_file, "utf-8")
            for name, file in files.items():
                try:
                    (Path(folder) / name).write_bytes(file.read_bytes())
                except FileNotFoundError:  # not every trial has it
                    continue
            self._client.log_artifacts(identity, folder)


def _milliseconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(1000 * moment.timestamp())
