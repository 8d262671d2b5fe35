"""The page docs/cli.md, made from the program.

.venv/bin/python tests/cli_page.py
"""

from __future__ import annotations

import html
import re
import subprocess
import sys

from folders import ROOT

PAGE = ROOT / "docs" / "cli.md"
HEAD = """# The command line

`make docs` writes this page from the program; `tuner VERB --help` shows the same.

Exit codes: 0 done, 1 an error that its message explains, 2 wrong usage, 130 interrupted.
Results go to stdout, everything else to stderr.

"""


def page() -> str:
    """Typer's own page of the commands, as the `--help` of each has them."""
    done = subprocess.run(
        [sys.executable, "-m", "typer", "tuner.cli.main", "utils", "docs", "--name", "tuner"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # Typer escapes for HTML also inside code.
    body = html.unescape(done.stdout)
    body = body[body.index("## `tuner init`") :]
    body = re.sub(r"^Example: (.*)$", r"Example: `\1`", body, flags=re.MULTILINE)
    body = re.sub(r"^\* `--help`: .*\n", "", body, flags=re.MULTILINE)
    return f"{HEAD}{body.rstrip()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
