"""Where the project lies."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
STUDIES = ROOT / "studies"
