"""What the terminal shows while a study runs, and the tables of `status`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from optuna.trial import FrozenTrial
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuner import logs
from tuner.coordination.words import describe_end, duration
from tuner.errors import counted, ordinal
from tuner.every import Every
from tuner.search.attributes import ENDED_KEY
from tuner.search.pruning_audit import audit_in_words
from tuner.search.status import StudyStatus, status
from tuner.search.tuned_study import TunedStudy
from tuner.train import EpochResult

_PLAIN_LINE_SECONDS = 10.0  #: between two lines of progress where stdout is no terminal
_REFRESH_SECONDS = 0.5
_WATCH_SECONDS = 2.0  #: between two looks of `status --watch`


class ProgressWatcher:
    """Shows a running study: live on a terminal, plain lines elsewhere."""

    def __init__(self, tuned: TunedStudy, console: Console) -> None:
        self._tuned = tuned
        self._console = console
        self._began = time.monotonic()
        self._epochs = 0  # trained in this run
        self._ended = 0  # trials that ended in this run
        self._latest: dict[int, EpochResult] = {}
        self._pause = Every(_REFRESH_SECONDS if console.is_terminal else _PLAIN_LINE_SECONDS)
        self._live: Live | None = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The block in which the study runs."""
        if not self._console.is_terminal:
            yield
            return
        # Its redirection would take a log that goes to a file, too.
        redirect = sys.stderr.isatty()
        with Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stderr=redirect
        ) as self._live:
            yield

    def epoch(self, trial: int, result: EpochResult) -> None:
        self._epochs += 1
        self._latest[trial] = result

    def trial_ended(self, trial: FrozenTrial) -> None:
        self._ended += 1
        self._latest.pop(trial.number, None)
        if trial.state.name == "COMPLETE" or trial.user_attrs.get(ENDED_KEY):
            with logs.about(trial=trial.number):
                self.say(describe_end(trial))

    def say(self, message: str) -> None:
        if logs.is_asked():
            with logs.about(study=self._tuned.name):
                logging.getLogger(logs.OURS).info(message)
            return
        self._console.print(message, soft_wrap=True)

    def tick(self, running: int) -> None:
        if not self._pause.is_due():
            return
        now = status(self._tuned, driven=True)
        if self._live is None:
            self.say(self._line(now))
        else:
            self._live.update(self._panel(now), refresh=True)

    def _line(self, now: StudyStatus) -> str:
        best = "-" if now.best is None else f"{now.best.value:.4f} (trial {now.best.number})"
        return (
            f"{now.finished_trials}/{counted(now.budget, 'trial')}: {now.trials_in_words}; best "
            f"validation loss {best}; {self._rate():.2f} epochs/s; "
            f"{counted(now.epochs_saved, 'epoch')} saved; "
            f"{self._time_left(now)} left"
        )

    def _panel(self, now: StudyStatus) -> Group:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(now.study, style="bold"),
            ProgressBar(total=now.budget, completed=now.finished_trials, width=30),
            f"{now.finished_trials}/{counted(now.budget, 'trial')}, {self._time_left(now)} left",
        )
        running = Table.grid(padding=(0, 2))
        for trial, result in sorted(self._latest.items()):
            running.add_row(
                f"trial {trial}",
                f"epoch {result.epoch}",
                f"validation loss {result.validation_loss:.4f}",
                f"{result.seconds:.1f} s an epoch",
            )
        return Group(head, Text(self._line(now), style="dim"), running)

    def _rate(self) -> float:
        """Epochs a second since this run began."""
        return self._epochs / max(time.monotonic() - self._began, 1e-9)

    def _time_left(self, now: StudyStatus) -> str:
        if not self._ended:
            return "?"
        seconds = (time.monotonic() - self._began) / self._ended
        return duration(seconds * max(now.budget - now.finished_trials, 0))


def megabytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e6:.1f} MB"


def _name(one: StudyStatus) -> Text:
    name = Text(one.study)
    return name.append(" (synthetic data)", "yellow") if one.synthetic else name


def watch_studies(
    look: Callable[[], list[StudyStatus]],
    render: Callable[[list[StudyStatus]], RenderableType],
    console: Console,
    *,
    in_place: bool,
) -> None:
    """Shows studies again and again, until none of them runs or waits in the queue.

    Args:
        look: Reads where they stand.
        render: What to print of that.
        console: Where to.
        in_place: Each time over what was printed before; else only what differs from it, whole.
    """
    with Live(console=console, auto_refresh=False) if in_place else nullcontext() as live:
        before: list[StudyStatus] | None = None
        while True:
            found = look()
            if live is not None:
                live.update(render(found), refresh=True)
            elif found != before:
                console.print(render(found), soft_wrap=True)
                console.file.flush()  # else it stays in a pipe's buffer
            if not any(one.state in ("queued", "running") for one in found):
                return
            before = found
            time.sleep(_WATCH_SECONDS)


def status_table(studies: list[StudyStatus]) -> Table:
    """The studies of a storage, a row each."""
    table = Table(box=None, pad_edge=False)
    for heading in ("study", "state", "trials", "best validation loss", "epochs", "saved", "disk"):
        table.add_column(heading, overflow="fold")
    for one in studies:
        best = "-" if one.best is None else f"{one.best.value:.4f} (trial {one.best.number})"
        table.add_row(
            _name(one),
            one.state,
            f"{one.finished_trials}/{one.budget}: {one.trials_in_words}",
            best,
            str(one.epochs_spent),
            str(one.epochs_saved),
            megabytes(one.bytes_on_disk),
        )
    return table


def status_details(one: StudyStatus, winner: str | None = None) -> Table:
    """Everything about one study, a line each; `winner` says whether its winner was confirmed."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("study", _name(one))
    table.add_row("state", one.state)
    if one.error:
        table.add_row("error", Text(one.error, "red"))
    table.add_row("trials", f"{one.finished_trials} of {one.budget} finished")
    if one.ended_early:
        table.add_row("", f"ended early: {one.ended_early}")
    table.add_row("", one.trials_in_words)
    if one.resumed_trials:
        table.add_row("", f"{one.resumed_trials} resumed after an interruption")
    if one.brackets:
        table.add_row("brackets", " / ".join(map(str, one.brackets)) + " trials")
    table.add_row("epochs", f"{one.epochs_spent} spent, {one.epochs_saved} saved by pruning")
    if one.pruning_audit is not None:
        table.add_row("audit", Text(audit_in_words(one.pruning_audit.to_document())))
    if one.openings:
        opened = f"opened for a report: the {ordinal(one.look)} look at it"
        table.add_row("test split", opened)
        if reason := one.openings[-1].reason:
            table.add_row("", Text(f"opened again because: {reason}"))
    table.add_row("workers", str(one.workers))
    table.add_row("disk", megabytes(one.bytes_on_disk))
    if one.best is not None:
        table.add_row("best", f"trial {one.best.number}, validation loss {one.best.value:.4f}")
        for name, value in one.best.params.items():
            table.add_row("", f"{name} = {value!r}")
    if winner is not None:
        table.add_row("winner", Text(winner))
    return table
