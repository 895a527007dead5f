"""The report of the self-test says what was run, where, and claims no more. This needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mvd_scale.utils.env_report import Capability

from . import report
from .report import PAGE, Check, SelfTestReport


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """The page is written on any machine."""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SelfTestReport:
    monkeypatch.setattr(report, "collect_capabilities", lambda: [Capability("Triton", False, reason="needs a GPU")])
    monkeypatch.setattr(report, "where", lambda: "1 x NVIDIA A GPU")
    written = SelfTestReport(tmp_path / "report.md")
    written.checks = {
        "a": Check("Kernels.", "test_a[x]", "passed", 1.25, figures={"error": 0.000123456, PAGE: "one\ntwo"}),
        "b": Check("Kernels.", "test_b", "failed", 0.5, "AssertionError: a | b", "long\nAssertionError: a | b"),
        "c": Check("NCCL with two GPUs.", "test_c", "skipped", 0.0, "one GPU: this needs two"),
        "d": Check("Decoding.", "test_d", "not run"),
    }
    return written


def test_every_check_stands_with_its_outcome_and_figures(page: SelfTestReport) -> None:
    text = page.to_markdown()
    assert "1 passed, 1 failed, 1 skipped, 1 not run of 4 checks, 0.0 minutes." in text
    assert "| `test_a[x]` | passed | 1.2 | error 0.0001235 |" in text
    assert "| `test_b` | failed | 0.5 | AssertionError: a \\| b |" in text
    assert "## test_a[x]\n\n```\none\ntwo\n```" in text
    assert "## Failure of test_b\n\n```\nlong\nAssertionError: a | b\n```" in text
    assert "Triton  off  needs a GPU" in text


def test_what_was_skipped_was_run_nowhere(page: SelfTestReport) -> None:
    text = page.to_markdown()
    assert "| Kernels | 1 x NVIDIA A GPU, torch " in text
    assert "| NCCL with two GPUs | nowhere | one GPU: this needs two |" in text
    assert "| Decoding | nowhere | not run |" in text


def test_one_rank_gathered_nothing(page: SelfTestReport) -> None:
    page.checks = {"a": Check("Precision.", "test_a", "passed", figures={"ranks": 1})}
    assert "1 passed; ZeRO on one rank: nothing was gathered or reduced between GPUs" in page.to_markdown()
    page.checks["a"].figures["ranks"] = 2
    assert "on one rank" not in page.to_markdown()


@pytest.mark.slow
def test_a_run_is_written_down(tmp_path: Path) -> None:
    out, here = tmp_path / "report.md", Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", str(here.with_name("test_nccl.py")), "-k", "sums"]
    subprocess.run([*command, "--gpu-report", str(out)], cwd=here.parents[2], check=True, stdout=subprocess.PIPE)
    text = out.read_text()
    assert "of 1 checks, " in text
    for said in ("## Machine", "## What has been run where", "| NCCL with two GPUs |", "test_nccl_sums_over_two_gpus"):
        assert said in text
