"""The overview of a study that stands in the dashboard, in Markdown, and the pages beside it.

The dashboard shows it as the study's note. Optuna's own page renders GitHub's Markdown without
HTML; what users name is escaped all the same, so that no name makes a link or a table.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any

from optuna.trial import TrialState

from tuner.commands import password_hint
from tuner.errors import counted
from tuner.every import Every
from tuner.search.attributes import AGAIN_KEY, BFLOAT16_FROM_KEY, WORKERS_KEY, curve_of
from tuner.search.status import State, StudyStatus, status
from tuner.search.tuned_study import TunedStudy

_WORKERS_SECONDS = 5.0  #: at most this often the number of workers is written down
_OVERVIEW_SECONDS = 5.0  #: at least this long between two overviews of the study

_STATE_WORDS: dict[State, str] = {
    "queued": "Queued",
    "running": "Running",
    "stopped": "Stopped",
    "finished": "Finished",
    "reported": "Reported",
}


class StudyNote:
    """Keeps what readers see of a study up to date while this process drives it."""

    def __init__(self, tuned: TunedStudy) -> None:
        self._tuned = tuned
        self._written: Future[None] | None = None  # the overview, as of the last time
        self._overview_pause = Every(_OVERVIEW_SECONDS)
        self._told_workers: int | None = None
        self._workers_pause = Every(_WORKERS_SECONDS)

    def tell_workers(self, workers: int) -> None:
        """Writes down now and then on how many workers the study runs; they come and go."""
        if workers != self._told_workers and self._workers_pause.is_due():
            self._tuned.storage.begin_user_attr(self._tuned.id, WORKERS_KEY, workers)
            self._told_workers = workers

    def refresh(self) -> None:
        """Brings the overview up to date now and then, for 2 % of the time at most."""
        is_written = self._written is None or self._written.done()
        if is_written and self._overview_pause.is_due():
            began = time.monotonic()
            self.begin("running")
            self._overview_pause.begin_pause(at_least=50 * (time.monotonic() - began))

    def begin(self, state: State) -> None:
        """Brings the overview up to date, without waiting for the database.

        Args:
            state: What the study is in, or about to be in.
        """
        now = status(self._tuned, driven=True)
        markdown = overview(self._tuned, now, state)
        self._written = self._tuned.storage.begin_note(self._tuned.id, markdown)


def attach_page(tuned: TunedStudy, name: str, content: bytes) -> None:
    """Attaches a page, such as the report, to a study; the overview then tells of it.

    Raises:
        OSError: The file cannot be written.
    """
    key, value = tuned.artifacts.attach(name, content)
    tuned.storage.optuna.set_study_system_attr(tuned.id, key, value)
    now = status(tuned)
    tuned.storage.begin_note(tuned.id, overview(tuned, now, now.state)).result()


def overview(tuned: TunedStudy, now: StudyStatus, state: State) -> str:
    """The overview in Markdown.

    Args:
        tuned: The study.
        now: Where it stands.
        state: What to call its state.
    """
    parts = [
        f"## {_escaped(now.study)}",
        _progress(now, state),
        _next(tuned, now, state),
        _best(now),
        _epochs(tuned, now),
        _brackets(tuned),
        _data(tuned),
        "*`tuner` keeps this note up to date: what is written into it here is replaced.*",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _progress(now: StudyStatus, state: State) -> str:
    finished, budget = now.finished_trials, now.budget
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    on = f" on {counted(now.workers, 'worker')}" if state == "running" else ""
    progress = (
        f"**{_STATE_WORDS[state]}{on}** as of {at}: **{finished} of "
        f"{counted(budget, 'trial')}** ({finished / budget:.0%}) are finished. All trials: "
        f"{now.trials_in_words.lower()}."
    )
    lines = [progress]
    if now.synthetic:
        lines.insert(0, "**SYNTHETIC DATA: the proteins are made up. No result means anything.**")
    if now.ended_early:
        lines.append(f"Ended early: {_escaped(now.ended_early)}.")
    if now.error and state != "running":
        lines.append(f"The service gave it up: {_escaped(now.error)}")
    return "\n\n".join(lines)


def _best(now: StudyStatus) -> str:
    best = now.best
    if best is None:
        return "### Best\n\nNo trial was trained to its end yet."
    reached = min(curve_of(best), key=lambda epoch: epoch.validation_loss, default=None)
    accuracy = "" if reached is None else f", accuracy {reached.validation_accuracy:.1%}"
    at = "" if reached is None else f" (epoch {reached.epoch} of {best.last_step})"
    rows = [f"| {_escaped(name)} | {_value(value)} |" for name, value in best.params.items()]
    table = "\n".join(["| hyperparameter | value |", "| --- | --- |", *rows]) if rows else ""
    found = f"### Best\n\nTrial {best.number}: **validation loss {best.value:.4f} nats**"
    again = best.user_attrs.get(AGAIN_KEY)
    line = f"Train it again:\n\n{_code(again)}" if isinstance(again, str) else ""
    return "\n\n".join(part for part in (f"{found}{accuracy}{at}.", table, line) if part)


def _epochs(tuned: TunedStudy, now: StudyStatus) -> str:
    spent, saved = now.epochs_spent, now.epochs_saved
    share = f" ({saved / (spent + saved):.0%} of what full trainings take)" if saved else ""
    resumed = now.resumed_trials
    again = (
        f" {counted(resumed, 'trial was', 'trials were')} resumed after an interruption."
        if resumed
        else ""
    )
    most = tuned.record.spec.training.max_epochs
    return (
        f"### Epochs\n\n{spent} spent, {saved} saved by pruning{share}; at most {most} a trial."
        f"{again}"
    )


def _brackets(tuned: TunedStudy) -> str:
    spec = tuned.record.spec
    if not spec.brackets:
        return ""
    states: list[list[TrialState]] = [[] for _ in spec.brackets]
    for trial in tuned.trials():
        bracket = spec.bracket_of(trial.number)
        if bracket is not None:
            states[bracket].append(trial.state)
    rows = [
        f"| {number} | {', '.join(map(str, rungs)) or 'none'} | {len(inside)} "
        f"| {inside.count(TrialState.COMPLETE)} | {inside.count(TrialState.PRUNED)} |"
        for number, (rungs, inside) in enumerate(zip(spec.brackets, states, strict=True))
    ]
    head = [
        "| bracket | may stop after epochs | trials | fully trained | pruned |",
        "| :---: | :---: | :---: | :---: | :---: |",
    ]
    return "### Hyperband\n\n" + "\n".join([*head, *rows])


def _data(tuned: TunedStudy) -> str:
    record = tuned.record
    data, split = record.data, record.spec.data.split
    counted = (
        f"{data.training_rows:,} training, {data.validation_rows:,} validation, "
        f"{data.test_rows:,} test (sealed until the report)"
    )
    rows = [
        ("source", _escaped(data.source)),
        ("rows", counted),
        ("data, sha256", f"`{data.sha256[:16]}`"),
        ("split", _escaped(split.described)),
        ("split identity", f"`{data.split_id[:16]}`"),
        ("study file", f"`{record.spec_hash[:16]}`, seed {record.spec.seed}"),
        ("precision", _precision(tuned)),
    ]
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "### Data and split\n\n" + "\n".join(["| | |", "| --- | --- |", *lines])


def _precision(tuned: TunedStudy) -> str:
    if tuned.record.precision != "auto":
        return tuned.record.precision
    fewest = tuned.study.user_attrs.get(BFLOAT16_FROM_KEY)
    if fewest is None:
        return "float32"
    return f"bfloat16 for networks of {fewest:g} multiply-adds a value or more, else float32"


def _next(tuned: TunedStudy, now: StudyStatus, state: State) -> str:
    hint = password_hint(tuned.storage.url)
    how = f"\n\n{_escaped(hint)}" if hint else ""
    if state == "running":
        say = "Nothing: it runs to its budget. This stops it, and what is trained is kept:"
        return f"### Next\n\n{say}\n\n{_code(tuned.command('stop', tuned.name))}{how}"
    if state in ("queued", "stopped"):
        waits = "waits for a service" if state == "queued" else "resumes with its study file"
        again = ("launch", "STUDY.toml") if state == "stopped" else ("serve",)
        return f"### Next\n\nIt {waits}:\n\n{_code(tuned.command(*again))}{how}"
    lines = [tuned.command("export", tuned.name, "--top", 3)] if now.best is not None else []
    if state == "finished" and now.best is not None:
        lines.append(tuned.command("report", tuned.name))
    if not lines:
        return "### Next\n\nNo trial was trained to its end: launch it with a larger budget."
    opened = (
        "The test split was opened: the report is attached to this study (Artifacts), and the "
        "study takes no more trials. Its best configurations:"
        if state == "reported"
        else "Write the best configurations; then open the test split, once, for the report:"
    )
    return f"### Next\n\n{opened}\n\n" + _code("\n".join(lines)) + how


def _code(text: str) -> str:
    """A block that no line of it can end."""
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _escaped(str(value))


def _escaped(text: str) -> str:
    """Text without a meaning in Markdown: no link, image, HTML, table or second line."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&:@-])", r"\\\1", " ".join(text.split()))
