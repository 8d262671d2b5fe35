"""What the verbs print, and to which stream; how they open the storage, and stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from tuner import logs

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.search.tuned_study import TunedStudy
    from tuner.storage.storage import Storage


logger = logging.getLogger(logs.OURS)


def complain(message: str) -> None:
    """Prints an error."""
    if logs.is_asked():
        logger.error(message)
        return
    typer.secho(message, fg=typer.colors.RED if sys.stderr.isatty() else None, err=True)


def print_note(message: str) -> None:
    """Prints a line to stderr, beside the results."""
    if logs.is_asked():
        logger.info(message)
        return
    typer.echo(message, err=True)


def log_line(message: str) -> None:
    """Logs a line of a process that runs until it is stopped."""
    logger.info(message)


#: Without a terminal, Rich assumes 80 columns, and folds or cuts what is longer.
_PIPE_COLUMNS = 100_000


def terminal(*, stderr: bool = False, **options: Any) -> Console:
    """The console that shows tables and progress.

    What it prints is text: `[bold]` or `:smile:` in a name, a path or an error is not markup.
    Styles are `rich.text.Text`.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_COLUMNS
    defaults = {"stderr": stderr, "width": width, "markup": False, "emoji": False}
    return Console(highlight=False, **(defaults | options))


def print_json(document: Any) -> None:
    """Prints a document as JSON."""
    typer.echo(json.dumps(document, indent=2))


def open_storage(
    url: str,
    *,
    patience_seconds: float | None = 5.0,
    say: Callable[[str], None] = print_note,
    create: bool = False,
) -> Storage:
    """Opens a storage.

    Args:
        url: Of the database.
        patience_seconds: How long an unavailable database is waited for; None: until it is there.
        say: Takes lines about an outage.
        create: Whether a storage that does not exist is created: only for verbs that write to it.
    """
    import optuna
    from stamina.instrumentation import set_on_retry_hooks

    from tuner.storage.storage import Storage

    set_on_retry_hooks(())  # the storage itself reports an outage
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logs.adopt()
    return Storage(url, patience_seconds=patience_seconds, say=say, create=create)


def warn_of_synthetic_data() -> None:
    """Warns that results of synthetic data say nothing about proteins."""
    print_warning(
        "SYNTHETIC DATA: the proteins of this study are made up. No result means anything."
    )


def print_warning(text: str) -> None:
    """Prints a warning."""
    if logs.is_asked():
        logger.warning(text)
        return
    line = "!" * 78
    typer.secho(f"{line}\n{text}\n{line}", fg=typer.colors.YELLOW, bold=True, err=True)


def lines_of_commands(tuned: TunedStudy, suggested: dict[str, str]) -> str:
    """Suggested commands, a line each.

    Args:
        tuned: The study that they are about.
        suggested: What each command does, a comment to the shell, by command.
    """
    from tuner.commands import password_hint

    width = max(map(len, suggested))
    lines = [f"  {command:<{width}}  # {what}" for command, what in suggested.items()]
    hint = password_hint(tuned.storage.url)
    return "\n".join(["Next:", *lines, *([hint] if hint else [])])


def stop_on_signals(stop_gracefully: Callable[[], None], *, has_log: bool = False) -> None:
    """Makes Ctrl-C and SIGTERM stop gracefully the first time, and at once the second time.

    Args:
        stop_gracefully: Asks for checkpoints of the running trials, and returns at once.
        has_log: Whether lines are written as the log; else only if the user asked for one.
    """
    from tuner.cluster.processes import SAME_SIGNAL_SECONDS

    asked_at: list[float] = []

    def say(message: str) -> None:
        is_log = has_log or logs.is_asked()
        os.write(2, logs.line(message) if is_log else f"\n{message}\n".encode())

    def stop(_number: int, _frame: FrameType | None) -> None:
        # One Ctrl-C may arrive twice (from the terminal, and from `make` or a wrapper).
        if not asked_at:
            asked_at.append(time.monotonic())
            stop_gracefully()
            say("Stopping: running trials save a checkpoint. Again: stop at once.")
        elif time.monotonic() - asked_at[0] > SAME_SIGNAL_SECONDS:
            say("Stopped at once. The same command resumes the study.")
            raise KeyboardInterrupt  # the workers are ended on the way out

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def require_training() -> None:
    """Refuses a verb that trains on this machine if this process cannot train."""
    from tuner.cluster.processes import require_training

    require_training()
