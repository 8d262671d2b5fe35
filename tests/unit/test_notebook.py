from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from finished_study import finished_study, storage_in
from folders import STUDIES

import tuner
from tuner.errors import SpecError, StorageMissingError, StudyError
from tuner.search.attributes import curve_of

TINY = """
name = "tiny"
trials = 2
[data]
source = "synthetic"
truncate = true
max_length = 60
[training]
max_epochs = 1
[space]
blocks = 1
filters = 4
embedding_dim = 4
pool_size = 4
kernel_size = { choices = [3, 5] }
head = "global_max"
dense_layers = 0
batch_size = 512
"""


def test_a_study_file_is_searched_in_a_notebook(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    spec = tuner.load_study_file(tmp_path / "tiny.toml", ["seed=3"])
    assert (spec.name, spec.seed) == ("tiny", 3)
    study = tuner.new_study(spec)
    study.optimize(tuner.local_objective(spec, artifacts=tmp_path / "artifacts"), n_trials=1)
    (trial,) = study.trials
    assert trial.value == curve_of(trial)[0].validation_loss
    assert trial.params.keys() == {"block1.kernel_size"}


def test_a_launched_study_is_opened_by_its_name(tmp_path: Path) -> None:
    with storage_in(tmp_path) as storage:
        made = finished_study(storage, tmp_path)
        ranked = [trial.number for trial in made.ranked()]
        best = made.study.best_value
    where = {"storage": storage.url, "artifacts": made.artifacts.folder.parent}
    with tuner.open_study(made.name, **where) as tuned:
        assert [trial.number for trial in tuned.ranked()] == ranked
        assert tuned.record == made.record
    plain = optuna.load_study(study_name=made.name, storage=storage.url)
    assert plain.best_value == best
    with pytest.raises(StudyError, match="no study 'none'"), tuner.open_study("none", **where):
        pass


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="trials"):
        tuner.load_study_file(STUDIES / "quickstart.toml", ["trials=-1"])
    url = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(StorageMissingError), tuner.open_study("quickstart", storage=url):
        pass
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_alone_imports_nothing_of_weight() -> None:
    code = (
        "import sys, tuner\n"
        "print(sorted({'optuna', 'numpy', 'tensorflow', 'tuner.notebook'} & set(sys.modules)))\n"
        "from tuner import *\n"
        "print(load_study_file.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "tuner.notebook"]
    assert not hasattr(tuner, "open_stud")
