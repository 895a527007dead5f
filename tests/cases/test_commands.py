"""Commands on files as people have them: what they can end with, and what they never print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import ForkServer

from .collect import cases


@pytest.mark.parametrize(("folder", "case"), cases("commands"))
def test_a_command_ends_as_it_may(
    folder: Path, case: dict[str, Any], fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for command in case["commands"]:
        code, printed = fork_server.run("mvd_scale", *command["arguments"])
        check_ending(command, code, printed)


def check_ending(expected: dict[str, Any], code: int, printed: str) -> None:
    """Check exit code and output by the keys `exit`, `says_if_2`, `never` and `silent` of a case."""
    assert code in expected["exit"], f"exit code {code}:\n{printed}"
    said = expected.get("says_if_2", []) if code == 2 else []
    assert [word for word in said if word not in printed] == [], printed
    assert [word for word in expected.get("never", []) if word in printed] == [], printed
    assert printed.strip() or expected.get("silent", True), "nothing was printed"
