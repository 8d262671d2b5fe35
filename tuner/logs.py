"""The log on stderr: one format for our own lines and those of Dask, Tornado and Optuna.

Results go to stdout and are no log. `set_up` is called once by each process: by the command line,
and by a training process as it starts, which inherits the wish through the environment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from tuner.errors import TunerError

LEVEL_VARIABLE, FORMAT_VARIABLE = "TUNER_LOG_LEVEL", "TUNER_LOG_FORMAT"
LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("text", "json")
OURS = "tuner"  #: the logger of what users are told

_about: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)


@contextlib.contextmanager
def about(*, study: str | None = None, trial: int | None = None) -> Iterator[None]:
    """Says for a block which study, and which of its trials, the lines of this thread are about."""
    given = {"study": study, "trial": trial}
    known = {key: value for key, value in given.items() if value is not None}
    token = _about.set((_about.get() or {}) | known)
    try:
        yield
    finally:
        _about.reset(token)


class Formatter(logging.Formatter):
    """One line for a person, or one JSON object a line."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        subject = _about.get() or {}
        at = datetime.fromtimestamp(record.created).astimezone()
        line: dict[str, Any] = {
            "ts": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "study": getattr(record, "study", subject.get("study")),
            "trial": getattr(record, "trial", subject.get("trial")),
        }
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            return json.dumps(line | ({"traceback": trace} if trace else {}))
        words = [line["ts"], record.levelname]
        if record.name != OURS:
            words.append(f"{record.name}:")
        if line["study"] is not None:
            words.append(f"study={line['study']}")
        if line["trial"] is not None:
            words.append(f"trial={line['trial']}")
        # A line of the log begins with its time; what follows of a message is indented.
        text = "\n".join(filter(None, (line["message"], trace))).replace("\n", "\n    ")
        return " ".join([*words, text])


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what `sys.stderr` is now: beside a live display, that is Rich's."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        pass


def level_asked() -> str | None:
    """The level that the user chose; None: our own lines from "info", of others errors alone."""
    return _chosen(LEVEL_VARIABLE, LEVELS)


def is_asked() -> bool:
    """Whether the user chose a level or a format: then all that is said on stderr is the log."""
    return bool(os.environ.get(LEVEL_VARIABLE) or os.environ.get(FORMAT_VARIABLE))


def _chosen(variable: str, values: tuple[str, ...]) -> str | None:
    value = os.environ.get(variable)
    if value and value.lower() not in values:
        raise TunerError(f"${variable} is {value!r}; it is one of {', '.join(values)}.")
    return value.lower() if value else None


def set_up() -> None:
    """Makes every logger of this process write to stderr, as the environment says.

    Raises:
        TunerError: A variable has a value that it cannot have.
    """
    level, form = level_asked(), _chosen(FORMAT_VARIABLE, FORMATS)
    handler = _Stderr()
    handler.setFormatter(Formatter(as_json=form == "json"))
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, _Stderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel((level or "error").upper())
    logging.getLogger(OURS).setLevel((level or "info").upper())
    logging.captureWarnings(is_asked())
    adopt()


def adopt() -> None:
    """Takes libraries' own handlers and levels away: called again after an import of one.

    Where no level was asked for, Dask is silent: what matters of it we say ourselves. A process
    whose log is not ours is left as it is.
    """
    if not any(isinstance(one, _Stderr) for one in logging.getLogger().handlers):
        return
    level = level_asked()
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if not isinstance(logger, logging.Logger) or name == OURS:
            continue
        own = [one for one in logger.handlers if type(one) is logging.StreamHandler]
        for handler in own:
            logger.removeHandler(handler)
        if own:
            logger.propagate = True
        if level is not None:
            logger.setLevel(logging.NOTSET)
        elif name == "distributed" or name.startswith("distributed."):
            logger.setLevel(logging.CRITICAL)


def line(message: str, *, level: int = logging.WARNING) -> bytes:
    """A line of the log for a signal handler, which must not wait for a lock of `logging`."""
    formatter = Formatter(as_json=_chosen(FORMAT_VARIABLE, FORMATS) == "json")
    record = logging.LogRecord(OURS, level, "", 0, message, None, None)
    return f"{formatter.format(record)}\n".encode()
