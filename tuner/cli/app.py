"""The application and its groups of verbs."""

from __future__ import annotations

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Tunes the network that predicts protein solubility; the test split stays sealed.",
)
data_app = typer.Typer(no_args_is_help=True, help="Audits data, and downloads the data set.")


storage_app = typer.Typer(
    no_args_is_help=True, help="Creates, upgrades and checks the database's schema."
)


ledger_app = typer.Typer(no_args_is_help=True, help="Proves that the record of openings is whole.")


dashboard_app = typer.Typer(
    invoke_without_command=True, epilog="Example: tuner dashboard --port 8080"
)
