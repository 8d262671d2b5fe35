"""replay: trains a trial again, or derives a search again, and compares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STORAGE_URL
from tuner.cli.app import app
from tuner.cli.options import ArtifactsRoot, AsJson, Name, StorageUrl
from tuner.cli.terminal import open_storage, print_json, terminal
from tuner.errors import counted

if TYPE_CHECKING:
    from tuner.results.replay import Replay
    from tuner.search.replay import SearchReplay
    from tuner.search.tuned_study import TunedStudy


@app.command(epilog="Example: tuner replay quickstart 12")
def replay(
    name: Name,
    trial: Annotated[
        int | None, typer.Argument(min=0, metavar="[TRIAL]", help="The trial's number.")
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Derive every suggestion and every verdict again; trains nothing."
        ),
    ] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Trains a trial again and compares its curve, or explains a search from its history."""
    from tuner.search.study import load

    if (trial is not None) == search:
        raise typer.BadParameter("Name a trial to train it again, or give --search.")
    with open_storage(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        if trial is None:
            equal = _search(tuned, as_json=as_json)
        else:
            equal = _trial(tuned, trial, as_json=as_json)
    if not equal:
        raise typer.Exit(1)


def _trial(tuned: TunedStudy, number: int, *, as_json: bool) -> bool:
    from tuner.results.replay import replay as replay_trial
    from tuner.train import EpochResult

    console = terminal(stderr=True)
    with console.status("") as status:

        def show(epoch: EpochResult) -> None:
            status.update(
                f"Trial {number}: epoch {epoch.epoch}, validation loss {epoch.validation_loss:.4f}"
            )

        found = replay_trial(tuned, number, on_epoch=show)
    if as_json:
        print_json(found.to_document())
    else:
        for line in _in_words(found):
            typer.echo(line)
    return found.equal


def _in_words(found: Replay) -> list[str]:
    epochs = counted(found.epochs, "epoch")
    if found.is_exact:
        lines = [f"Trial {found.trial} is the same again, bit for bit: {epochs}."]
    else:
        how = "within the tolerances" if found.within_tolerances else "beyond the tolerances"
        said = (
            f"Trial {found.trial} differs: {epochs} compared, validation losses by up to "
            f"{found.largest_difference:.2g} nats, {how} for another machine or other versions."
        )
        lines = [said]
        if first := found.first_difference:
            lines.append(
                f"First: epoch {first.epoch}, {first.figure}: stored {first.stored!r}, now "
                f"{first.replayed!r}."
            )
    if found.differs is None:
        lines.append("What trained it is not stored: an earlier version ran this study.")
    elif not found.differs and not found.is_exact:
        lines.append("Machine, versions, precision and threads are the same: it should be equal.")
    for what, (stored, here) in (found.differs or {}).items():
        lines.append(f"{what}: {stored!r} when it was trained, {here!r} here.")
    return lines


def _search(tuned: TunedStudy, *, as_json: bool) -> bool:
    from rich.progress import Progress

    from tuner.search.replay import replay_search

    console = terminal(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Decisions", total=None)
        found = replay_search(
            tuned, on_decision=lambda at, of: progress.update(task, completed=at, total=of)
        )
    if as_json:
        print_json(found.to_document())
    else:
        for line in _search_in_words(found):
            typer.echo(line)
    return found.explained


def _search_in_words(found: SearchReplay) -> list[str]:
    decisions = counted(found.decisions, "decision")
    if found.explained:
        said = (
            f"All of {decisions} explained: {counted(found.asks, 'suggestion')}, "
            f"{counted(found.verdicts, 'verdict')}, {counted(found.ends, 'end')}."
        )
        lines = [said]
    else:
        first = found.first_unexplained
        lines = [f"NOT explained: {first.in_words if first else ''}"]
        lines.append(f"{found.explained_decisions} of {decisions} before it are explained.")
    return [*lines, *(f"Note: {note}" for note in found.notes)]
