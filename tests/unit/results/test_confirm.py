"""What a confirmation finds, and who uses it: intervals, ties, export, bundle and report."""

from __future__ import annotations

import io
import json
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeWorkers, Notes, epoch_result
from finished_study import storage_in, study_with_networks

from tuner.coordination.coordinator import Coordinator
from tuner.errors import StudyError
from tuner.metrics import cross_entropy
from tuner.results.bundle_writer import write_bundle
from tuner.results.choice import choose_best, choose_both, recorded_ensemble
from tuner.results.confirm import compare
from tuner.results.export import best_configs, config_of_trial
from tuner.results.kept import read_development
from tuner.results.report import write_report
from tuner.results.resampling import intervals, resampled_deviations, tied_with_best
from tuner.search.attributes import OF_CONFIGURATION_KEY
from tuner.search.confirmation import Confirmation, confirmation_of, plan_confirmation
from tuner.search.tuned_study import TunedStudy
from tuner.train import VALIDATION_LOGITS, EpochResult, TrainingJob


def confirmed_study(folder: Path) -> tuple[TunedStudy, Confirmation]:
    """A study whose trial 2 is the best of its confirmation; its networks exist."""
    from tuner.network.model import build_model, named_weights
    from tuner.network.predict import logits

    tuned = study_with_networks(storage_in(folder), folder)
    found = plan_confirmation(tuned, top=3, seeds=2)
    development = read_development(tuned)
    noise = {0: 0.5, 1: 0.45, 2: 0.1, "default": 0.6}

    def train(job: TrainingJob) -> Generator[EpochResult, None, None]:
        """Keeps a network, the worse the more noise there is in its weights."""
        label = found.tuned.trials()[job.trial].user_attrs[OF_CONFIGURATION_KEY]
        generator = np.random.default_rng(job.trial)
        weights = named_weights(build_model(job.config, 200, seed=job.trial)).items()
        kept = {key: one + generator.normal(0, noise[label], one.shape) for key, one in weights}
        file = io.BytesIO()
        np.savez(file, **kept)
        predicted = logits(job.config, file.getvalue(), development.validation_tokens)
        file = io.BytesIO()
        np.savez(file, **kept, **{VALIDATION_LOGITS: predicted.astype(np.float32)})
        path = found.tuned.artifacts.weights(job.trial)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        loss = float(cross_entropy(development.validation_labels, predicted).mean())
        yield epoch_result(loss, 1)

    Coordinator(found.tuned, FakeWorkers(train=train), Notes()).run()
    again = confirmation_of(tuned)
    assert again is not None
    return tuned, again


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[TunedStudy, Confirmation]:
    return confirmed_study(tmp_path_factory.mktemp("confirmed"))


def test_the_comparison_says_what_was_trained(both: tuple[TunedStudy, Confirmation]) -> None:
    tuned, confirmation = both
    found = compare(confirmation)
    document = json.loads(json.dumps(found.to_document(), allow_nan=False))
    means = [config["mean"] for config in document["configs"]]
    assert means == sorted(means)
    assert document["winner"] == document["configs"][0]["trial"] == 2
    assert document["winner"] in document["tied"]
    assert document["smallest_tied"] in document["tied"]
    for config in (*document["configs"], *document["references"]):
        assert config["mean"] == pytest.approx(np.mean(config["values"]))
        assert config["sd"] == pytest.approx(np.std(config["values"], ddof=1))
        assert config["mean_ci95"][0] < config["mean"] < config["mean_ci95"][1]
        assert config["difference"] == pytest.approx(config["mean"] - means[0])
    assert [one["name"] for one in document["references"]] == ["default"]
    best = tuned.ranked()[0]
    its = next(one for one in document["configs"] if one["trial"] == best.number)
    assert document["optimism"] == pytest.approx(its["mean"] - best.value)
    assert compare(confirmation) == found
    said = " ".join(found.in_words())
    for words in ("Winner: trial 2", "seeds' sd", "Optimism of the search", "the default conf"):
        assert words in said


def test_networks_of_the_confirmed_winner_are_used(
    both: tuple[TunedStudy, Confirmation], tmp_path: Path
) -> None:
    tuned, confirmation = both
    assert best_configs(tuned, 3)[0].trial == 2
    assert best_configs(tuned)[0].confirmed_mean == compare(confirmation).winner.mean
    single, _ = choose_both(tuned)
    assert single.study.name == "nets-confirm"
    labels = {
        trial.number: trial.user_attrs[OF_CONFIGURATION_KEY]
        for trial in confirmation.tuned.trials()
    }
    assert labels[single.trials[0]] == 2
    ensemble = recorded_ensemble(tuned)
    assert ensemble is not None
    assert ensemble.study.name == "nets-confirm"
    chosen = choose_best(tuned)
    configs = [config_of_trial(chosen.study, number) for number in chosen.trials]
    described = write_bundle(tuned, chosen, configs, tmp_path / "bundle")
    assert (described["study"], described["trained_in"]) == ("nets", "nets-confirm")
    assert "Confirmed: trial 2" in (tmp_path / "bundle" / "README.md").read_text()
    assert {one["seed"] for one in described["networks"]} == {chosen.study.record.spec.seed}


def test_the_report_evaluates_the_confirmed_winner(tmp_path: Path) -> None:
    tuned, confirmation = confirmed_study(tmp_path)
    root = tmp_path / "artifacts"
    with pytest.raises(StudyError, match="is the confirmation of 'nets', whose report uses it"):
        write_report(tuned.storage, confirmation.tuned.name, artifacts_root=root)
    report = write_report(tuned.storage, tuned.name, artifacts_root=root)
    document = report.document
    assert document["trial"] == document["confirmation"]["winner"] == 2
    single, ensemble = choose_both(tuned)
    network = {"study": "nets-confirm", "trial": single.trials[0]}
    assert document["confirmation"]["network"] == network
    (entry,) = tuned.storage.ledger.entries(study_key=tuned.key)
    assert entry.trial == 2
    for chosen in filter(None, (single, ensemble)):
        configs = [config_of_trial(chosen.study, number) for number in chosen.trials]
        described = write_bundle(tuned, chosen, configs, tmp_path / "bundle")
        assert described["ledger"]["entry"] == entry.id
    page = report.html_file.read_text()
    for text in (report.summary(), page):
        assert "Winner: trial 2, mean validation loss" in text
        assert "Optimism of the search" in text
    for one in document["confirmation"]["configs"]:
        assert f'<th scope="row">trial {one["trial"]}' in page
        assert f'<td class="number">{one["mean"]:.4f}</td>' in page


def test_a_confirmation_that_is_not_finished_is_not_compared(tmp_path: Path) -> None:
    tuned = study_with_networks(storage_in(tmp_path), tmp_path)
    found = plan_confirmation(tuned, top=1, seeds=2)
    with pytest.raises(StudyError, match=r"not finished \(0 of 4 trainings\).* resumes it"):
        compare(found)


# --- intervals ---


def losses(
    seeds: int, rows: int, *, of_seeds: float = 0.0, of_rows: float = 0.0, k: int = 2
) -> np.ndarray:
    """Losses of 0.6 with deviations of that size, those of the rows the same for all, [k, s, m]."""
    generator = np.random.default_rng(1)
    return (
        0.6
        + generator.normal(0, of_seeds, (k, seeds, 1))
        + generator.normal(0, of_rows, (1, 1, rows))
    )


def test_rows_that_are_hard_for_all_cancel_in_a_difference() -> None:
    deviations = resampled_deviations(losses(5, 900, of_rows=0.3), np.random.default_rng(0))
    assert deviations.std(axis=0) == pytest.approx(0.3 / np.sqrt(900), rel=0.1)
    assert np.abs(deviations[:, 0] - deviations[:, 1]).max() < 1e-12


def test_few_seeds_have_the_tails_of_students_t() -> None:
    made = losses(3, 50, of_seeds=0.02)
    deviations = resampled_deviations(made, np.random.default_rng(0), 40_000)
    ((low, high), _) = intervals(made.mean(axis=(1, 2)), deviations)
    of_mean = made[0, :, 0].std(ddof=1) / np.sqrt(3)
    assert (high - low) / 2 == pytest.approx(4.303 * of_mean, rel=0.05)  # t of 2, 97.5 %


def test_what_seeds_change_from_row_to_row_is_counted_once() -> None:
    made = 0.6 + np.random.default_rng(2).normal(0, 0.3, (40, 5, 500))  # no part of it is a seed's
    deviations = resampled_deviations(made, np.random.default_rng(0), 500)
    assert np.median(deviations.std(axis=0)) == pytest.approx(0.3 / np.sqrt(5 * 500), rel=0.1)


def test_ties_are_those_that_chance_explains() -> None:
    made = losses(5, 400, of_seeds=0.001, k=4)
    made += np.array([0.0, 0.0003, 0.05, 0.1])[:, np.newaxis, np.newaxis]
    deviations = resampled_deviations(made, np.random.default_rng(0))
    means = made.mean(axis=(1, 2))
    tied = tied_with_best(means, deviations)
    assert int(means.argmin()) in tied
    assert set(tied) <= {0, 1}
    same = np.repeat(made[:1], 2, axis=0)
    assert tied_with_best(same.mean(axis=(1, 2)), np.zeros((10, 2))) == [0, 1]
    assert tied_with_best(np.array([0.5, 0.6]), np.zeros((10, 2))) == [0]
