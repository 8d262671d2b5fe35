"""Whether a command line of the docs, of compose or of Kubernetes is one that its program takes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import typer
from distributed.cli.dask_scheduler import main as dask_scheduler

from tuner.cli.main import app

_TLS_OPTIONS = {"--tls-ca-file": "tls_ca_file", "--tls-cert": "tls_cert", "--tls-key": "tls_key"}


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The options that a command line gives; its program is not run.

    Raises:
        Exception: Its program would refuse it; Typer and Dask have a kind each.
    """
    program, *arguments = words
    name = PurePath(program).name
    if name == "tuner":
        return _parse_verb(typer.main.get_command(app), arguments)
    if name == "dask" and arguments[0] == "scheduler":
        return _parse_dask_scheduler(arguments[1:])
    raise ValueError(f"not a program of ours: {shlex.join(words)}")


def _parse_dask_scheduler(arguments: Sequence[str]) -> dict[str, Any]:
    # It asks whether the files are there, which they need not be here.
    pairs = zip(["", *arguments], arguments, strict=False)
    files = {before: word for before, word in pairs if before in _TLS_OPTIONS}
    there = [os.devnull if word in files.values() else word for word in arguments]
    options = dask_scheduler.make_context("scheduler", there).params
    return options | {_TLS_OPTIONS[before]: word for before, word in files.items()}


def _parse_verb(command: Any, arguments: Sequence[str]) -> dict[str, Any]:
    context = command.make_context("tuner", list(arguments))
    while hasattr(command, "commands"):  # a group: `tuner` itself, `tuner storage`
        rest = [*context._protected_args, *context.args]
        if not rest and command.invoke_without_command:  # `tuner dashboard`
            break
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)
    return context.params
