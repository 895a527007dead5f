"""Every message that a user can get has an entry in the troubleshooting guide, and no entry is of one that is gone."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from .pages import REPOSITORY

GUIDE = REPOSITORY / "docs/guides/troubleshooting.md"

GAP = "\0"
"""Stands for a value in the template of a message."""

Pattern = tuple[str, ...]
"""Pieces of a message in their order, with any text between them."""


def template(node: ast.expr) -> str:
    """The text of a message with `GAP` for each value; of a choice between texts, both."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    if isinstance(node, ast.IfExp):
        return template(node.body) + GAP + template(node.orelse)
    return GAP


def messages(names: tuple[str, ...], folder: str) -> dict[str, str]:
    """Templates of the errors of some kinds that the code of a folder makes, by file and line."""
    found = {}
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
                found[f"{path.relative_to(REPOSITORY)}:{node.lineno}"] = template(node.args[0])
    return found


@cache
def user_errors() -> dict[str, str]:
    """Without those that hand on a text which is put together elsewhere."""
    found = messages(("UserError",), "mvd_scale")
    return {place: text for place, text in found.items() if len(re.findall(r"\w+", text)) > 1}


@cache
def entries() -> list[Pattern]:
    """The messages of the guide: the code in the first cell of each row."""
    found: list[Pattern] = []
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 5:
            found += [
                tuple(piece.strip() for piece in code.strip("`").replace("\\|", "|").split("…") if piece.strip())
                for code in cells[1].strip().split("<br>")
                if code.startswith("`")
            ]
    return found


def fits(pattern: Pattern, message: str) -> bool:
    """Whether the pieces of a pattern stand in a message in their order."""
    place = 0
    for piece in pattern:
        place = message.find(piece, place) + len(piece)
        if place < len(piece):
            return False
    return True


@cache
def all_texts() -> list[str]:
    """Every text of the code, since some messages are put together elsewhere, and the launch scripts as they are."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (REPOSITORY / "mvd_scale").rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    texts = [template(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr))]
    return [*texts, *(path.read_text(encoding="utf-8") for path in (REPOSITORY / "launch").iterdir() if path.is_file())]


@pytest.mark.parametrize("place", user_errors())
def test_a_message_has_an_entry(place: str) -> None:
    message = user_errors()[place]
    assert any(fits(pattern, message) for pattern in entries()), (
        f"{GUIDE.name} has no entry for {place}: {message.replace(GAP, '…')!r}"
    )


@pytest.mark.parametrize("pattern", entries(), ids=lambda pattern: "…".join(pattern)[:70])
def test_an_entry_is_of_a_message(pattern: Pattern) -> None:
    assert any(fits(pattern, text) for text in all_texts()), f"no message reads {'…'.join(pattern)!r}"


def test_the_guide_has_entries() -> None:
    assert len(entries()) > 100
    assert not fits(("one", "two"), "two one")
