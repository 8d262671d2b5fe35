"""What proves the ledger whole beside the ledger: its kept heads, and who looked at a split before.

A database can be replaced by an older copy of itself, whole and without a trace in it. So the head
of the chain is also kept with the artifacts, after each entry, and in each report.

Why: `docs/decisions.md#what-keeps-the-ledger-from-being-changed`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.artifacts import append_lines, kept_heads_folder, kept_heads_path
from tuner.errors import StudyError, TunerError, counted, ordinal
from tuner.search import overlap
from tuner.search.study import load
from tuner.search.tuned_study import TunedStudy
from tuner.storage.chain import Head, Link
from tuner.storage.ledger import Chain, Ledger
from tuner.storage.splits import sequences_hash
from tuner.storage.storage import Storage

#: In a report's page, the head of the chain at that time.
HEAD_META = "tuner-ledger-head"
_IN_A_PAGE = re.compile(rf'<meta name="{HEAD_META}" content="(\w+) (\d+) (\w+)">')

_LISTED_LOOKS = 3  #: that an error names; the rest are counted


# --- heads ---


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptHead:
    """A head that was kept outside the database."""

    place: str  #: the file, with the line where it has many
    head: Head
    line: Mapping[str, Any]  #: what else the file says of the entry; {} in a report


def keep_heads(ledger: Ledger, artifacts_root: Path) -> None:
    """Adds what the ledger holds since the last time to the file of its heads.

    Raises:
        OSError: It cannot be written.
    """
    chain = ledger.chain()
    path = kept_heads_path(artifacts_root, chain.identity)
    known = {kept.head.position for kept in _kept_lines(path)}
    lines = [_line(chain, link) for link in chain.links if link.position not in known]
    if lines:
        append_lines(path, lines)


def _line(chain: Chain, link: Link) -> str:
    content = link.content
    said = (
        {name: content[name] for name in ("opened_at", "opened_by", "study", "split_id", "look")}
        if link.kind == "opening"
        else {"recorded_at": content["recorded_at"]}
    )
    entry = content["id"] if link.kind == "opening" else content["entry"]
    head = {"ledger": chain.identity, "position": link.position, "hash": link.hash}
    return json.dumps({**head, "kind": link.kind, "entry": entry, **said}, ensure_ascii=False)


def _kept_lines(path: Path) -> Iterator[KeptHead]:
    """The lines of a file of heads; those that a crash cut off are left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            document = json.loads(line)
            head = Head(**{field.name: document[field.name] for field in dataclasses.fields(Head)})
        except (ValueError, KeyError, TypeError):
            continue
        yield KeptHead(place=f"{path}:{number}", head=head, line=document)


def kept_heads(artifacts_root: Path, reports: Iterable[Path] = ()) -> Iterator[KeptHead]:
    """Every head that is kept with the artifacts, and in reports.

    Args:
        artifacts_root: Where the files of heads are, and the reports of studies.
        reports: Other reports, JSON or HTML.

    Raises:
        TunerError: A report that was named cannot be read, or holds no head.
    """
    for path in sorted(kept_heads_folder(artifacts_root).glob("*.jsonl")):
        yield from _kept_lines(path)
    for path in sorted(artifacts_root.glob("*/report/report.json")):
        if (head := _head_in_report(path)) is not None:
            yield KeptHead(place=str(path), head=head, line={})
    for path in reports:
        head = _head_in_report(path)
        if head is None:
            raise TunerError(
                f"{path}: no report with the head of a ledger; name a report.json or report.html "
                "that this version wrote."
            )
        yield KeptHead(place=str(path), head=head, line={})


def _head_in_report(path: Path) -> Head | None:
    """The head in a report; None in one of an earlier version, and where there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if found := _IN_A_PAGE.search(text):
        return Head(ledger=found[1], position=int(found[2]), hash=found[3])
    try:
        return Head(**json.loads(text)["ledger"]["head"])
    except (ValueError, KeyError, TypeError):
        return None


# --- verification ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `tuner ledger verify` found."""

    entries: int  #: openings in the ledger
    reports: int  #: of those, with what they found
    head: Head
    problems: tuple[str, ...]  #: what is wrong; () if the ledger is whole
    notes: tuple[str, ...]  #: what limits what that proves

    @property
    def valid(self) -> bool:
        return not self.problems

    def to_document(self) -> dict[str, Any]:
        """What `tuner ledger verify --json` prints."""
        return {"valid": self.valid, **dataclasses.asdict(self)}


def verify(storage: Storage, artifacts_root: Path, reports: Iterable[Path] = ()) -> Verification:
    """Compares the ledger with itself, with the heads that were kept, and with its splits.

    Args:
        storage: Whose ledger.
        artifacts_root: Where its heads are kept.
        reports: Reports, JSON or HTML, that are kept elsewhere.

    Raises:
        TunerError: See `kept_heads`.
    """
    problems = list(storage.ledger.problems())
    if any("table" in problem and "is missing" in problem for problem in problems):
        nothing = Head(ledger="", position=0, hash="")
        return Verification(entries=0, reports=0, head=nothing, problems=tuple(problems), notes=())
    chain = storage.ledger.chain()
    kept = list(kept_heads(artifacts_root, reports))
    problems += _against_heads(chain, kept)
    problems += _against_splits(storage, chain)
    return Verification(
        entries=len(chain.openings),
        reports=len(chain.links) - len(chain.openings),
        head=chain.head,
        problems=tuple(problems),
        notes=tuple(_notes(chain, kept, artifacts_root)),
    )


def _against_heads(chain: Chain, kept: Sequence[KeptHead]) -> Iterator[str]:
    hashes = {link.position: link.hash for link in chain.links}
    missing = [
        one
        for one in kept
        if one.head.ledger == chain.identity and one.head.position not in (0, *hashes)
    ]
    if missing:
        most = max(missing, key=lambda one: one.head.position)
        yield (
            f"{most.place} keeps head {most.head.position} of this ledger, which ends at "
            f"{chain.head.position}: entries were removed at its end, or an older copy of the "
            "database was restored."
        )
    for one in kept:
        found = hashes.get(one.head.position)
        if one.head.ledger == chain.identity and found not in (None, one.head.hash):
            yield (
                f"{one.place} keeps another hash of place {one.head.position} "
                f"({one.head.hash[:12]}, in the ledger {str(found)[:12]}): the ledger was "
                "rewritten, or another copy of the database went on."
            )


def _against_splits(storage: Storage, chain: Chain) -> Iterator[str]:
    """Which opened split lacks its sequences, or has others: what overlaps would be hidden."""
    known = storage.splits.all()
    for link in chain.openings:
        recorded, split_id = link.content["sequences_sha256"], link.content["split_id"]
        if recorded is None:  # of an earlier version, which did not keep them
            continue
        its = known.get(split_id)
        if its is None or sequences_hash(its) != recorded:
            what = "are missing" if its is None else "were changed"
            yield (
                f"the sequences of split {str(split_id)[:12]}, which ledger entry "
                f"{link.content['id']} opened, {what} in the database: openings of splits that "
                "share rows with it would not be found."
            )


def _notes(chain: Chain, kept: Sequence[KeptHead], artifacts_root: Path) -> Iterator[str]:
    at_upgrade = [link for link in chain.openings if link.content["chained_at"]]
    if at_upgrade:
        yield (
            f"{counted(len(at_upgrade), 'entry', 'entries')} of an earlier version "
            f"{'was' if len(at_upgrade) == 1 else 'were'} chained at the upgrade of "
            f"{at_upgrade[0].content['chained_at']}: nothing proves that nobody changed them "
            "before."
        )
    mine = [one for one in kept if one.head.ledger == chain.identity]
    highest = max((one.head.position for one in mine), default=0)
    if chain.head.position > highest:
        yield (
            f"No head beyond {highest} of {chain.head.position} is kept under {artifacts_root}: "
            "what was removed after that, or in an older copy of the database, would not be found."
        )
    for before, after in zip(chain.openings, chain.openings[1:], strict=False):
        if str(after.content["opened_at"]) < str(before.content["opened_at"]):
            yield (
                f"Ledger entry {after.content['id']} says that it is older than entry "
                f"{before.content['id']}, which it follows: a clock was set back."
            )
    for ledger, lines in sorted(_other_ledgers(chain.identity, kept).items()):
        openings = [one.line for one in lines if one.line.get("kind") == "opening"]
        yield (
            f"{artifacts_root} also keeps {counted(len(lines), 'head')} of another ledger "
            f"({ledger[:12]}, {counted(len(openings), 'opening')}): of another storage that "
            "shares these artifacts, or of one that was deleted. Its openings of a split count "
            "when that split is opened here."
        )


def _other_ledgers(identity: str, kept: Iterable[KeptHead]) -> dict[str, list[KeptHead]]:
    others: dict[str, list[KeptHead]] = {}
    for one in kept:
        if one.head.ledger != identity:
            others.setdefault(one.head.ledger, []).append(one)
    return others


# --- who looked before ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """An earlier opening of most of a study's test rows."""

    entry: int
    ledger: str | None  #: where this ledger does not hold it, the identity of the one that did
    opened_at: str
    opened_by: str
    study: str
    study_key: str | None  #: of that study; None where only a kept head tells of it
    is_own: bool  #: the study's own
    is_recorded: bool  #: what it found is recorded
    split_id: str
    rows: int  #: of the study's test rows; 0 where that is not known

    @property
    def in_words(self) -> str:
        where = "" if self.ledger is None else " (not in this ledger, but kept with the artifacts)"
        rows = f", {self.rows:,} of its rows" if self.rows else ""
        return (
            f"entry {self.entry}{where} ({self.opened_at}, {self.opened_by}, for study "
            f"{self.study!r}{rows})"
        )


def looks_before(tuned: TunedStudy) -> tuple[Look, ...]:
    """The earlier openings of at least half of a study's test rows, oldest first.

    Those that this ledger does not hold, whose heads are kept with the same artifacts, by the
    split's identity alone. A smaller share is what another split seed has by chance: the report
    warns of it.
    """
    storage, data = tuned.storage, tuned.record.data
    found = [
        Look(
            entry=entry.id,
            ledger=None,
            opened_at=entry.opened_at,
            opened_by=entry.opened_by,
            study=entry.study,
            study_key=entry.study_key,
            is_own=entry.study_key == tuned.key,
            is_recorded=entry.report is not None,
            split_id=entry.split_id,
            rows=data.test_rows if entry.split_id == data.split_id else shared,
        )
        for entry, shared in overlap.openings(storage, data.split_id)
        if entry.split_id == data.split_id or 2 * shared >= data.test_rows
    ]
    return (*looks_kept_elsewhere(tuned), *found)


def looks_kept_elsewhere(tuned: TunedStudy) -> Iterator[Look]:
    """Openings whose heads are kept with the artifacts, and which this ledger does not hold.

    They are of another storage that shares the artifacts, of one that was deleted, or of this one
    before an older copy of it was restored.
    """
    chain = tuned.storage.ledger.chain()
    here = {link.hash for link in chain.links}
    kept = list(kept_heads(tuned.artifacts.folder.parent))
    recorded = {
        (one.head.ledger, one.line["entry"]) for one in kept if one.line.get("kind") == "report"
    }
    for one in kept:
        line = one.line
        if line.get("kind") != "opening" or one.head.hash in here:
            continue
        if line["split_id"] == tuned.record.data.split_id:
            yield Look(
                entry=line["entry"],
                ledger=one.head.ledger,
                opened_at=line["opened_at"],
                opened_by=line["opened_by"],
                study=line["study"],
                study_key=None,
                is_own=False,
                is_recorded=(one.head.ledger, line["entry"]) in recorded,
                split_id=line["split_id"],
                rows=tuned.record.data.test_rows,
            )


def again_reason(tuned: TunedStudy, looks: Sequence[Look], reason: str | None) -> str | None:
    """Why the split may be opened; None for the first time.

    Args:
        tuned: The study whose split would be opened.
        looks: What `looks_before` found.
        reason: What the user gave for opening it again.

    Raises:
        StudyError: It was opened before, and no reason was given; or the other way round.
    """
    if not looks:
        if reason is None:
            return None
        raise StudyError(
            f"The test split of study {tuned.name!r} was never opened, so this is the first look: "
            "leave --again and --reason out. Nothing was opened."
        )
    if reason is not None:
        return reason
    if all(look.is_own and not look.is_recorded for look in looks):
        entries = ", ".join(str(look.entry) for look in looks)
        return f"the evaluation of ledger entry {entries} was never recorded"
    raise StudyError(_refusal(tuned, looks))


def _is_there(tuned: TunedStudy, look: Look) -> bool:
    """Whether the study of an opening can still be asked for its report."""
    try:
        found = load(tuned.storage, look.study, artifacts_root=tuned.artifacts.folder.parent)
    except StudyError:
        return False
    return found.key == look.study_key


def _refusal(tuned: TunedStudy, looks: Sequence[Look]) -> str:
    data = tuned.record.data
    listed = "; ".join(look.in_words for look in looks[:_LISTED_LOOKS])
    if len(looks) > _LISTED_LOOKS:
        listed += f"; and {len(looks) - _LISTED_LOOKS} more"
    kept = next((look for look in looks if look.is_recorded and _is_there(tuned, look)), None)
    shown = ""
    if kept is not None:
        shown = (
            f" The report that was kept can be looked at: `{tuned.command('report', kept.study)}` "
            "shows it and opens nothing."
        )
    again = tuned.command("report", tuned.name, "--again", "--reason", "WHY")
    return (
        f"The test split of study {tuned.name!r} ({counted(data.test_rows, 'row')}, identity "
        f"{data.split_id[:12]}) was opened before: {listed}. What was learned there makes further "
        f"figures on it a little too good.{shown} `{again}` opens it again; every report and the "
        f"ledger then say permanently that it is the {ordinal(len(looks) + 1)} look. Nothing was "
        "opened."
    )
