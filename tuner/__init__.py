"""Hyperparameter tuning of a protein-solubility network, with a sealed test split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.notebook import (
        load_bundle,
        load_study_file,
        local_objective,
        new_study,
        open_study,
    )

__all__ = ["load_bundle", "load_study_file", "local_objective", "new_study", "open_study"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tuner import notebook  # noqa: PLC0415 - the command line must not wait for Optuna

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
