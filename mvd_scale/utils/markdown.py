"""Tables and code blocks of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table; vertical bars in cells are escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in lines)


def code(text: str) -> str:
    """Format a block of code."""
    return f"```\n{text}\n```"


def number(value: object) -> str:
    """Format a figure: floats with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def counted(count: int, noun: str) -> str:
    """Format a number of things, such as `1 host` or `2 hosts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def first_line(text: str | None) -> str:
    """Return the first line of a text that is not empty; an empty string if there is none."""
    return next(iter((text or "").strip().splitlines()), "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
