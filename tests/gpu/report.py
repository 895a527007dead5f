"""The report of the GPU self-test: one page of Markdown for an issue, with the table of what has been run where."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mvd_scale import __version__
from mvd_scale.performance.bringup.checks.machine import driver_version
from mvd_scale.performance.report import this_machine
from mvd_scale.utils.env_report import collect_capabilities, format_capabilities
from mvd_scale.utils.markdown import code, first_line, number, table

PAGE = "page"
"""Name of a figure that is a text of many lines."""

ALONE = "; ZeRO on one rank: nothing was gathered or reduced between GPUs, and nothing here says anything of NCCL"
"""Addition to the results of checks that would use several GPUs if there were any."""


@dataclass
class Check:
    """One test."""

    part: str
    """First line of its file's docstring."""
    name: str
    outcome: str = "passed"
    seconds: float = 0.0
    reason: str = ""
    """Why it was skipped, or the last line of how it failed."""
    details: str = ""
    figures: dict[str, object] = field(default_factory=dict)


class SelfTestReport:
    """A pytest plugin that keeps book of all checks of this folder and writes the page at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checks: dict[str, Check] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if isinstance(item, pytest.Function) and item.get_closest_marker("gpu"):
                self.checks[item.nodeid] = Check(first_line(item.module.__doc__), item.name, "not run")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        check = self.checks.get(report.nodeid)
        if check is None:
            return
        check.seconds += report.duration
        check.figures |= dict(report.user_properties)
        if report.skipped:
            assert isinstance(report.longrepr, tuple)
            check.outcome, check.reason = "skipped", report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            check.outcome, check.details = "failed", report.longreprtext
            crash = getattr(report.longrepr, "reprcrash", None)
            check.reason = first_line(crash.message if crash else report.longreprtext)
        elif report.when == "call":
            check.outcome = "passed"

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(self.to_markdown(), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"report: {self.path}")

    def to_markdown(self) -> str:
        """The whole page."""
        checks = list(self.checks.values())
        sections = [
            f"# GPU self-test of MVD-Scale {__version__}, {datetime.date.today()}",
            f"{_counts(checks)} of {len(checks)} checks, {sum(check.seconds for check in checks) / 60:.1f} minutes.",
            "## Machine",
            "\n".join(f"- {line}" for line in _machine()),
            "## What has been run where",
            table(("part", "where", "result"), [_row_of_part(part, checks) for part in _parts(checks)]),
            "## Checks",
            table(("check", "outcome", "s", "figures, or why not"), [_row_of_check(check) for check in checks]),
        ]
        for check in checks:
            if PAGE in check.figures:
                sections += [f"## {check.name}", code(str(check.figures[PAGE]))]
        for check in checks:
            if check.details:
                sections += [f"## Failure of {check.name}", code("\n".join(check.details.splitlines()[-40:]))]
        sections += ["## Capabilities", code(format_capabilities(collect_capabilities()))]
        return "\n\n".join(sections) + "\n"


def where() -> str:
    """The GPUs of this machine in a few words, or that there is none."""
    if not torch.cuda.is_available():
        return "no GPU"
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name(0)}"


def _machine() -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = ("deepspeed", "triton", "flash-attn", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "av", "timm")
    lines = [where(), this_machine(device, packages).title()]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        lines.append(
            f"{gpu.total_memory / 2**30:.0f} GiB each, compute capability {gpu.major}.{gpu.minor}, "
            f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, "
            f"driver {driver_version()}"
        )
    return lines


def _parts(checks: list[Check]) -> list[str]:
    return list(dict.fromkeys(check.part for check in checks))


def _row_of_part(part: str, checks: list[Check]) -> tuple[str, ...]:
    """A part was run on a machine only if one of its checks was; one rank neither gathers nor reduces anything."""
    mine = [check for check in checks if check.part == part]
    if any(check.outcome in ("passed", "failed") for check in mine):
        alone = any(check.figures.get("ranks") == 1 for check in mine)
        result = f"{_counts(mine)}{ALONE if alone else ''}"
        return part.rstrip("."), f"{where()}, torch {torch.__version__}", result
    reasons = dict.fromkeys(check.reason or check.outcome for check in mine)
    return part.rstrip("."), "nowhere", "; ".join(reasons)


def _row_of_check(check: Check) -> tuple[str, ...]:
    figures = [f"{name} {number(value)}" for name, value in check.figures.items() if name != PAGE]
    said = "; ".join([*([check.reason] if check.reason else []), *figures])
    return f"`{check.name}`", check.outcome, f"{check.seconds:.1f}", said


def _counts(checks: list[Check]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in Counter(check.outcome for check in checks).items())
