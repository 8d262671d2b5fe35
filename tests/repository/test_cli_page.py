from __future__ import annotations

from cli_page import PAGE, page


def test_the_page_of_the_command_line_is_the_programs() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"
