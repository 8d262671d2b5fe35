"""The audit log: every change that was made through the web server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change through the dashboard."""

    id: int
    at: str  #: ISO 8601, UTC
    who: str
    address: str
    action: str  #: method and path
    detail: str
    status: int | None  #: of the answer; None where the server died before it answered


def one_line(text: str) -> str:
    """Text without what forges a line, commands a terminal, or is no text to a database."""
    line = " ".join(text.split())
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in line)
