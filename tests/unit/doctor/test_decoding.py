"""Decoding is tried in a process of its own, whose death or hang is a finding."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from mvd_scale.doctor.checks import decoding
from mvd_scale.doctor.findings import Finding


def decoded(monkeypatch: pytest.MonkeyPatch, answer: subprocess.CompletedProcess[str] | Exception) -> Finding:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "cpu"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("subprocess.run", run)
    (finding,) = decoding.decode("cpu")
    return finding


@pytest.mark.parametrize("outcome", ["ok", "left out", "fail"])
def test_its_answer_is_handed_on(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    line = f'a greeting\n{{"outcome": "{outcome}", "detail": "frames", "figures": {{"levels": 1.5}}}}\n'
    finding = decoded(monkeypatch, subprocess.CompletedProcess([], 0, line, ""))
    assert (finding.outcome, finding.detail, finding.figures) == (outcome, "frames", {"levels": 1.5})


def test_a_decoder_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = decoded(monkeypatch, subprocess.CompletedProcess([], -7, "", "Fatal\nBus error\n"))
    assert (finding.outcome, finding.detail) == ("fail", "the decoder ends by signal 7: Bus error")


def test_a_decoder_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = decoded(monkeypatch, subprocess.TimeoutExpired("python", 120))
    assert (finding.outcome, finding.detail) == ("fail", "the decoder does not end within 120 s")
