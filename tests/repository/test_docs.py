from __future__ import annotations

import re
from pathlib import Path

import pytest
from folders import ROOT

from tuner.spec.reader import load_spec

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings)
    return {words.replace(" ", "-") for words in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    missing = []
    for place, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text("utf-8")):
        if "://" in place:
            continue
        target = page.parent / place if place else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            missing.append(f"{place}#{anchor}")
    assert missing == []


def test_the_decisions_that_code_names_are_there() -> None:
    named = {
        (path.name, page, anchor)
        for path in (ROOT / "tuner").rglob("*.py")
        for page, anchor in re.findall(r"docs/([\w-]+\.md)#([\w-]+)", path.read_text("utf-8"))
    }
    assert len({path for path, _, _ in named}) > 20
    missing = [one for one in sorted(named) if one[2] not in anchors(ROOT / "docs" / one[1])]
    assert missing == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("page", ["README.md", "docs/study-files.md"])
def test_the_study_files_of_the_pages_are_valid(page: str, tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    spec = load_spec(tmp_path / "study.toml")
    assert (spec.name, spec.trials, spec.rungs) == ("my-study", 50, (1, 3, 9))
