"""The command line's entry: the verbs together, and the one place that catches errors."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from tuner import __version__, logs
from tuner.cli.app import app, dashboard_app, data_app, ledger_app, storage_app
from tuner.cli.terminal import complain, logger
from tuner.errors import TunerError

# Each registers its verbs; the order is that of `tuner --help`.
from tuner.cli import (  # isort: skip  # noqa: F401
    init,
    launch,
    confirm,
    studies,
    ledger,
    replay,
    export,
    predict,
    serve,
    audit,
)


app.add_typer(data_app, name="data")
app.add_typer(ledger_app, name="ledger")
app.add_typer(storage_app, name="storage")
app.add_typer(dashboard_app, name="dashboard")


def main() -> NoReturn:
    """Runs the command line and exits.

    0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
    """
    debug = "--debug" in sys.argv or bool(os.environ.get("TUNER_DEBUG"))
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
        os.environ[logs.LEVEL_VARIABLE] = "debug"
    # A name or a path that the output's encoding does not have is shown escaped, as on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        logs.set_up()
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk is reported here, and not when Python ends
    except KeyboardInterrupt:
        complain("Interrupted.")
        sys.exit(130)
    except Exception as error:
        _drop_stdout_if_unwritable()
        if isinstance(error, BrokenPipeError):  # `tuner status | head`
            sys.exit(1)
        message = _explanation(error)
        if message is None and logs.is_asked():
            logger.critical("%s: %s", type(error).__name__, error, exc_info=error)
            sys.exit(1)
        if debug or message is None:
            raise
        complain(message)
        sys.exit(1)
    sys.exit(0)


def _drop_stdout_if_unwritable() -> None:
    """Python would try to print the rest again when it ends, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explanation(error: Exception) -> str | None:
    """What to tell the user; None if the error is a bug."""
    # Optuna's error is one of the database, in the middle of a study.
    if isinstance(error, TunerError) or type(error).__name__ == "StorageInternalError":
        return str(error)
    if isinstance(error, OSError):
        place = "the output" if error.filename is None else error.filename
        return f"{place}: {error.strerror or error}. --debug shows where that happened."
    return None


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and the logs.")
    ] = False,
) -> None:
    pass
