"""Hostfiles as people have them: the ranks run, or one message says what is wrong."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import ROOT

from .collect import cases
from .test_commands import check_ending


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "case"), cases("hostfiles"))
def test_a_hostfile_is_read_or_named(folder: Path, case: dict[str, Any]) -> None:
    for file, expected in case["hostfiles"].items():
        place = {"HOSTFILE": file, "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
        ended = subprocess.run(
            [ROOT / "launch" / "multi_node.sh", "recipes"],
            cwd=folder,
            env={**os.environ, **place},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        check_ending(expected, ended.returncode, ended.stdout)
