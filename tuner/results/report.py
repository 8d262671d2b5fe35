"""The final report: the winner on the test split, once.

Everything that can be checked without a test row is checked first; then the ledger is written,
the test rows are read (`tuner.results.heldout`), the winner is evaluated from its kept weights, the
result is recorded, and the report is published.

Why: `docs/decisions.md#why-does-the-report-first-rehearse`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tuner.artifacts import kept_heads_folder, publish, require_writable
from tuner.coordination.study_note import attach_page
from tuner.data.prepare import HeldOutRows
from tuner.errors import (
    LeaseLostError,
    SetupError,
    StudyError,
    TunerError,
    counted,
    ordinal,
    reason_of,
)
from tuner.metrics import Floats, measure, roc_curve
from tuner.results import heldout, report_page, seal
from tuner.results.analysis import Predicted, analyse
from tuner.results.analysis_page import analysis_in_words
from tuner.results.baselines import Baseline
from tuner.results.choice import Chosen, choose_both, predict_together
from tuner.results.confirm import compare
from tuner.results.export import config_hash
from tuner.results.kept import Evaluate, KeptNetwork
from tuner.results.other_splits import reports_side_by_side
from tuner.search import overlap
from tuner.search.attributes import ENDED_KEY, curve_of
from tuner.search.confirmation import confirmed, winner_in_words
from tuner.search.record import versions
from tuner.search.status import status as status_of
from tuner.search.study import load
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.storage.lease import LEASE_SECONDS
from tuner.storage.ledger import EnsembleMember, OpenedMeanwhileError
from tuner.storage.storage import Storage

JSON_FILE, HTML_FILE = "report.json", "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report that was written."""

    document: Mapping[str, Any]  #: what `report.json` holds
    json_file: Path
    html_file: Path  #: the page
    opened_now: bool  #: False where the recorded report is shown again

    @property
    def synthetic(self) -> bool:
        return bool(self.document["synthetic"])

    def to_document(self) -> dict[str, Any]:
        """What `tuner report --json` prints: `report.json`, and where the files are."""
        files = {"json": str(self.json_file), "html": str(self.html_file)}
        return {**self.document, "opened_now": self.opened_now, "files": files}

    def summary(self) -> str:
        """What the terminal shows: the figures, what was opened, where to read on."""
        document = self.document
        lines = [
            report_page.headline(document),
            *(
                f"  {row.name:<10}{row.test:>10}   ({row.interval})"
                for row in report_page.metric_rows(document)
            ),
            report_page.gap_in_words(document),
            *report_page.confirmation_in_words(document),
            *filter(None, [report_page.ensemble_in_words(document)]),
            *report_page.other_splits_in_words(document),
            *analysis_in_words(document),
            self._opening(),
            *report_page.warnings(document),
            f"Read on in {self.html_file} ({self.json_file.name} beside it has every figure).",
        ]
        return "\n".join(lines)

    def _opening(self) -> str:
        ledger = self.document["ledger"]
        entry, look = ledger["entry"], ledger["look"]
        if self.opened_now:
            again = f", the {ordinal(look)} look at these rows" if look > 1 else ""
            return (
                f"The test split was opened: ledger entry {entry}{again}. The study takes no more "
                "trials."
            )
        return f"Nothing was opened: this is the report recorded in ledger entry {entry}."


def write_report(
    storage: Storage,
    name: str,
    *,
    artifacts_root: Path,
    output: Path | None = None,
    data: Path | None = None,
    evaluate: Evaluate | None = None,
    again: str | None = None,
    fit: Callable[[TunedStudy], Sequence[Baseline]] | None = None,
) -> Report:
    """Evaluates the winner of a finished study on the test split and writes the report.

    A second call shows the recorded report and opens nothing; only the count of openings is
    read anew. An opening whose evaluation never ended counts, and the next call opens again. Rows
    that were opened before, by whatever study, are opened again only with a reason.

    Args:
        storage: Where the study is.
        name: The study's name.
        artifacts_root: Where its weights and development file are.
        output: The folder of `report.json` and `report.html`; the study's own by default.
        data: Where the study's data is now, if not where its study file names it: a file, or the
            folder that holds it.
        evaluate: Predicts with trained weights; `tuner.network.predict.logits` by default.
        again: Opens the test split again, for this reason: it is shown with every report.
        fit: Fits what the winner is compared with; without it, nothing is.

    Raises:
        StudyError: There is no such study, it is running or not finished, its winner cannot be
            evaluated, its data changed, its test rows were opened before, or another process took
            it over meanwhile.
        DataError: The source cannot be used.
        TunerError: The files cannot be written.
    """
    tuned = load(storage, name, artifacts_root=artifacts_root)
    _refuse_a_confirmation(tuned)
    folder = output or tuned.artifacts.report_folder
    _require_writable(folder)
    recorded, opened_now = _recorded_report(tuned), False
    if recorded is None or again is not None:
        recorded, opened_now = _open_and_evaluate(tuned, evaluate, data, again, fit)
    document = _with_the_ledger_of_now(tuned, recorded)
    document["warnings"] = list(report_page.warnings(document))
    page = report_page.render(document)
    written = Report(
        document=document,
        json_file=folder / JSON_FILE,
        html_file=folder / HTML_FILE,
        opened_now=opened_now,
    )
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    try:
        publish(written.json_file, f"{text}\n".encode())
        publish(written.html_file, page.encode())
        attach_page(tuned, "report.html", page.encode())
    except OSError as error:
        raise TunerError(
            f"{folder}: the report cannot be written ({error.strerror or error}). It is recorded "
            f"in the storage: `{tuned.command('report', name, '-o', 'DIR')}` writes it elsewhere "
            "and opens nothing."
        ) from error
    return written


def _recorded_report(tuned: TunedStudy) -> dict[str, Any] | None:
    """What the last call recorded for this very study."""
    reports = [entry.report for entry in tuned.storage.ledger.entries(study_key=tuned.key)]
    return next((report for report in reversed(reports) if report is not None), None)


def _open_and_evaluate(
    tuned: TunedStudy,
    evaluate: Evaluate | None,
    data: Path | None,
    again: str | None,
    fit: Callable[[TunedStudy], Sequence[Baseline]] | None,
) -> tuple[dict[str, Any], bool]:
    """Opens the split, and records what the winner is worth on it.

    Returns:
        The report, and True; or False with one that another process recorded a moment ago.
    """
    _require_not_running(tuned)
    _require_finished(tuned)
    # While this process holds the lease no coordinator starts, and no second report opens.
    with tuned.storage.lease.held(tuned.id):
        recorded = _recorded_report(tuned)
        if recorded is not None and again is None:
            return recorded, False
        _require_finished(tuned)
        source = heldout.check_source(tuned, data)
        heldout.know_sequences(tuned, source)
        looks = seal.looks_before(tuned)
        reason = seal.again_reason(tuned, looks, again)
        _require_a_winner(tuned)
        with _nothing_is_opened():
            # The rehearsal, with rows that are not sealed: weights that do not give the loss for
            # which they were chosen would waste the one opening.
            single, ensemble = choose_both(tuned, evaluate=evaluate)
            baselines = None if fit is None else _fitted(tuned, fit)
            winner, confirmation = _confirmation(tuned, single, evaluate)
        try:
            entry, rows = heldout.open_test_split(
                tuned,
                trial=winner,
                config_hash=config_hash(single.networks[0].config),
                ensemble=_members(ensemble),
                settings=source,
                looks=looks,
                reason=reason,
            )
        except OpenedMeanwhileError as error:
            raise StudyError(
                f"Study {tuned.name!r}: {error}. Nothing was opened here; report again, which says "
                "who did."
            ) from error
        except OSError as error:
            place = kept_heads_folder(tuned.artifacts.folder.parent)
            raise StudyError(
                f"{error.filename or place}: the head of the ledger cannot be kept "
                f"({reason_of(error)}). The opening stands in the ledger, and no test row was "
                "read; once that is solved, report again."
            ) from error
        except LeaseLostError as error:
            raise StudyError(
                f"{_lost(tuned)} Nothing was opened; report again once it is finished."
            ) from error
        try:
            logits = predict_together(single, rows.tokens, evaluate)
            figures = _figures(single, rows, logits)
            together, together_logits = None, None
            if ensemble is not None:
                together_logits = predict_together(ensemble, rows.tokens, evaluate)
                together = _ensemble_document(ensemble, rows, together_logits)
            predicted = Predicted(winner=logits, ensemble=together_logits)
            analysed = analyse(single, rows, predicted, baselines, evaluate=evaluate)
        except (OSError, MemoryError) as error:
            raise StudyError(
                f"The test split was opened (ledger entry {entry}), but trial {winner.number} "
                f"could not be evaluated ({reason_of(error)}); once that is solved, report again, "
                "which opens the split once more."
            ) from error
        document = {
            "study": tuned.name,
            "trial": winner.number,
            "synthetic": tuned.record.data.synthetic,
            **figures,
            "validation_loss": single.networks[0].trial.value,
            "confirmation": confirmation,
            "ensemble": together,
            **analysed,
            "ledger": {"entry": entry},
            **_winner_document(tuned, single.networks[0]),
            **_study_document(tuned),
        }
        # As it will be read back, so that both calls show the same.
        document = dict(json.loads(json.dumps(document, allow_nan=False)))
        try:
            tuned.storage.ledger.record_report(entry, document)
            with contextlib.suppress(OSError):  # the opening's head is kept: this is more
                seal.keep_heads(tuned.storage.ledger, tuned.artifacts.folder.parent)
        except LeaseLostError as error:
            raise StudyError(
                f"{_lost(tuned)} The test split was opened (ledger entry {entry}), but what was "
                f"found is not recorded: `{tuned.command('report', tuned.name)}` shows the "
                "report of the other process, or opens the split once more."
            ) from error
    return document, True


def _fitted(
    tuned: TunedStudy, fit: Callable[[TunedStudy], Sequence[Baseline]]
) -> Sequence[Baseline]:
    try:
        return fit(tuned)
    except SetupError as error:
        raise StudyError(
            f"The baselines of the report cannot be fitted: {error} Or leave them out "
            "(--no-baselines)."
        ) from error


def _lost(tuned: TunedStudy) -> str:
    return (
        f"Another process took study {tuned.name!r} over while this report was made, for this one "
        f"or its database stood still for more than {LEASE_SECONDS:.0f} s."
    )


def _figures(chosen: Chosen, rows: HeldOutRows, logits: Floats) -> dict[str, Any]:
    """What networks are worth on the test rows, beside the validation rows."""
    test = measure(rows.labels, logits)
    return {
        "test": test.to_document(),
        "confusion_matrix": dataclasses.asdict(test.confusion),
        "roc_curve": roc_curve(rows.labels, logits),
        "validation": chosen.validation.to_document(),
    }


def _confirmation(
    tuned: TunedStudy, single: Chosen, evaluate: Evaluate | None
) -> tuple[FrozenTrial, dict[str, Any]]:
    """The winner's trial in the search, and how far it was confirmed that it wins."""
    network = single.networks[0].trial
    found = confirmed(tuned)
    if found is None:
        return network, {"in_words": [winner_in_words(tuned, suggest=False)]}
    compared = compare(found, evaluate=evaluate)
    evaluated = {"study": found.tuned.name, "trial": network.number}
    document = {"in_words": compared.in_words(), "network": evaluated, **compared.to_document()}
    return next(one for one in tuned.ranked() if one.number == compared.winner.label), document


def _members(ensemble: Chosen | None) -> tuple[EnsembleMember, ...]:
    if ensemble is None:
        return ()
    return tuple(
        EnsembleMember(
            trial=network.trial.number, share=share, config_hash=config_hash(network.config)
        )
        for network, share in zip(ensemble.networks, ensemble.shares, strict=True)
    )


def _ensemble_document(ensemble: Chosen, rows: HeldOutRows, logits: Floats) -> dict[str, Any]:
    selection = ensemble.selection
    crossed = None if selection is None else selection.cross_fitted
    return {
        "networks": [
            {
                **dataclasses.asdict(member),
                "validation_loss": network.trial.value,
                "weights_sha256": hashlib.sha256(network.weights).hexdigest(),
            }
            for member, network in zip(_members(ensemble), ensemble.networks, strict=True)
        ],
        "cross_fitted": None if crossed is None else crossed.to_document(),
        "is_better": selection is not None and selection.is_better,
        **_figures(ensemble, rows, logits),
    }


def _winner_document(tuned: TunedStudy, network: KeptNetwork) -> dict[str, Any]:
    winner, config = network.trial, network.config
    return {
        "epochs": winner.last_step or 0,
        "curve": [
            {
                "epoch": result.epoch,
                "training_loss": _finite(result.training_loss),
                "validation_loss": _finite(result.validation_loss),
            }
            for result in curve_of(winner)
        ],
        "sampled": winner.params,
        "config": dataclasses.asdict(config),
        "config_hash": config_hash(config),
        "weights_sha256": hashlib.sha256(network.weights).hexdigest(),
        "precision": tuned.precision_of(config),
    }


def _study_document(tuned: TunedStudy) -> dict[str, Any]:
    record, status = tuned.record, status_of(tuned)
    return {
        "spec": record.spec.to_document(),
        "spec_hash": record.spec_hash,
        "budget": tuned.budget,
        "trials": {state: count for state, count in status.counts.items() if count},
        "epochs_spent": status.epochs_spent,
        "epochs_saved": status.epochs_saved,
        "pruning_audit": status.pruning_audit and status.pruning_audit.to_document(),
        "history": [_history_row(trial) for trial in tuned.trials(*FINISHED)],
        "data": record.data.to_document(),
        "sampler": dict(record.sampler),
        "pruner": dict(record.pruner),
        "created_at": record.created_at,
        "artifacts": record.folder,
        "versions": dict(record.versions),
        "evaluated_with": versions(),
    }


def _history_row(trial: FrozenTrial) -> dict[str, Any]:
    """One trial of the search; a pruned one has the best loss that it had reached."""
    losses = [loss for loss in trial.intermediate_values.values() if math.isfinite(loss)]
    value = trial.value if trial.state == TrialState.COMPLETE else min(losses, default=None)
    return {
        "trial": trial.number,
        "state": trial.state.name,
        "validation_loss": None if value is None else _finite(value),
        "epochs": trial.last_step or 0,
        "ended": trial.user_attrs.get(ENDED_KEY),
    }


def _finite(value: float) -> float | None:
    """The value; None, as JSON knows no NaN, where there is none."""
    return value if math.isfinite(value) else None


def _with_the_ledger_of_now(tuned: TunedStudy, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded report with all openings of its test rows up to now, by whatever study."""
    data = tuned.record.data
    rows = overlap.openings(tuned.storage, data.split_id)
    entry = recorded["ledger"]["entry"]
    its_entry = next((row for row, _ in rows if row.id == entry), None)
    chain = tuned.storage.ledger.chain()
    ledger = {
        "entry": entry,
        "entry_hash": its_entry and its_entry.hash,
        "look": its_entry.look if its_entry else 1,
        "reason": its_entry and its_entry.reason,
        "head": dataclasses.asdict(chain.head),
        "problems": list(seal.verify(tuned.storage, tuned.artifacts.folder.parent).problems),
        "openings": len(rows),
        "kept_elsewhere": [dataclasses.asdict(look) for look in seal.looks_kept_elsewhere(tuned)],
        "test_rows": data.test_rows,
        "rows": [
            {
                "entry": row.id,
                "opened_at": row.opened_at,
                "opened_by": row.opened_by,
                "study": row.study,
                "trial": row.trial,
                "ensemble": [member.trial for member in row.ensemble],
                "look": row.look,
                "reason": row.reason,
                "evaluated": row.report is not None,
                "shared_rows": data.test_rows if row.split_id == data.split_id else shared,
            }
            for row, shared in rows
        ],
        "used_elsewhere": [dataclasses.asdict(one) for one in overlap.used_elsewhere(tuned)],
    }
    side_by_side = reports_side_by_side(tuned, recorded)
    return {**recorded, "ledger": ledger, "side_by_side": side_by_side}


# --- what is checked before anything is opened ---


@contextlib.contextmanager
def _nothing_is_opened() -> Iterator[None]:
    """Adds to an error that the test split is as sealed as before."""
    try:
        yield
    except StudyError as error:
        raise StudyError(f"{error} Nothing was opened.") from error


def _refuse_a_confirmation(tuned: TunedStudy) -> None:
    if tuned.confirms:
        name = tuned.confirms["study"]
        raise StudyError(
            f"Study {tuned.name!r} is the confirmation of {name!r}, whose report uses it: "
            f"`{tuned.command('report', name)}`. Nothing was opened."
        )


def _require_not_running(tuned: TunedStudy) -> None:
    lease = tuned.storage.leases.of(tuned.id)
    if lease is not None and lease.is_live:
        raise StudyError(
            f"Study {tuned.name!r} is being run by process {lease.holder.pid} on "
            f"{lease.holder.host}; a report closes a study for more trials, so wait until it is "
            f"finished, or stop it first (`{tuned.command('stop', tuned.name)}`). Nothing was "
            "opened."
        )


def _require_finished(tuned: TunedStudy) -> None:
    finished = len(tuned.trials(*FINISHED))
    if finished < tuned.budget:
        lower = f", or lower the budget (--trials {finished})" if finished else ""
        raise StudyError(
            f"Study {tuned.name!r} has finished {finished} of its "
            f"{counted(tuned.budget, 'trial')}; a report closes it for more. Finish it "
            f"first (`{tuned.command('launch', 'STUDY.toml')}`, its study file){lower}. Nothing "
            "was opened."
        )


def _require_a_winner(tuned: TunedStudy) -> None:
    if not tuned.ranked():
        raise StudyError(
            f"Study {tuned.name!r} has no fully trained trial (all were pruned), so there is no "
            "winner to evaluate; launch it with a larger budget (--trials). Nothing was opened."
        )


def _require_writable(folder: Path) -> None:
    try:
        require_writable(folder, JSON_FILE, HTML_FILE)
    except OSError as error:
        raise TunerError(
            f"{error.filename or folder}: the report cannot be written there "
            f"({error.strerror or error}); name a folder that you may write with -o. Nothing was "
            "opened."
        ) from error
