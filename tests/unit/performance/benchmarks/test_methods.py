"""`bench step --checkpointing`: every choice is measured and compared with `none`."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from mvd_scale.cli import cli
from mvd_scale.config.training import Checkpointing
from mvd_scale.errors import UserError
from mvd_scale.performance.benchmarks.methods import METHODS

from ..test_compare import STEP


def test_every_choice_of_checkpointing_stands_beside_none(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {
        choice: replace(STEP, milliseconds_per_step=200.0 * times, peak_memory_gib=4 / times)
        for choice, times in zip(get_args(Checkpointing), (1, 2, 1.25), strict=True)
    }

    def bench(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[command.index("--recipe") + 1] == "quickstart/student"
        assert command[-2] == "--training.gradient_checkpointing"
        return subprocess.CompletedProcess(command, 0, measured[command[-1]].to_json())

    monkeypatch.setattr(subprocess, "run", bench)
    words = ["bench", "step", "--checkpointing", "--recipe", "quickstart/student"]
    lines = CliRunner().invoke(cli, words, catch_exceptions=False).output.splitlines()
    rows = [line.split() for line in lines[-3:]]
    assert [(name, time, memory) for name, _, time, _, memory in rows] == [
        ("none", "1.00", "1.00"), ("block", "2.00", "0.50"), ("attention", "1.25", "0.80"),
    ]  # fmt: skip

    result = CliRunner().invoke(cli, [*words, "--training.gradient_checkpointing=block"])
    assert isinstance(result.exception, UserError)


def test_every_method_can_be_named_in_a_list() -> None:
    assert not [name for name in METHODS if "," in name]
