"""The page on fidelity: its rows are whole, and the tests that it names exist."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .pages import REPOSITORY

PAGE = REPOSITORY / "docs" / "fidelity.md"


def rows() -> Iterator[list[str]]:
    """The cells of each row of the tables, without their heads."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if not re.fullmatch(r"[|-]+", line) and not re.fullmatch(r"[|-]+", after):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_each_row_states_paper_published_code_ours_and_effect() -> None:
    found = list(rows())
    assert len(found) > 50
    for cells in found:
        assert len(cells) == 4, cells
        assert all(cells), cells


def test_the_tests_that_hold_the_rows_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    code = "\n".join(file.read_text() for file in (REPOSITORY / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert named <= set(re.findall(r"^(?:async )?def (test_\w+)", code, re.MULTILINE))
