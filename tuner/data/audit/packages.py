"""What the audit needs beside the tuner's own dependencies: SciPy and scikit-learn."""

from __future__ import annotations

from importlib.util import find_spec

from tuner.commands import install_command
from tuner.errors import SetupError


def require_packages(what: str, *modules: str) -> None:
    """Makes sure that packages of the extra `audit` are there.

    Args:
        what: What needs them, the subject of a sentence.
        modules: "scipy" or "sklearn".

    Raises:
        SetupError: One is missing; names the command that installs it.
    """
    names = {"scipy": "SciPy", "sklearn": "scikit-learn"}
    if missing := [names[module] for module in modules if find_spec(module) is None]:
        raise SetupError(
            f"{what} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"not installed: `{install_command('audit')}`."
        )
