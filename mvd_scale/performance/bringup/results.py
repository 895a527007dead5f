"""Results of a bring-up: checks by stage, and the files that are complete at any moment.

Both files are replaced as a whole after every event, so that a bring-up that is killed leaves all that it found.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvd_scale.utils.io import write_atomic
from mvd_scale.utils.markdown import code, number, table

Figures = dict[str, Any]
"""Numbers and texts by name."""

FAULTS = ("failed", "crashed", "hung")


@dataclass
class CheckResult:
    """Result of one check."""

    name: str

    outcome: str
    """`passed`, `failed`, `left out`, `crashed` (its process died), `hung` (it was stopped), `cut off` (the time of the
    stage ended) or `running`."""

    seconds: float = 0.0
    reason: str = ""
    figures: Figures = field(default_factory=dict)

    details: str = ""
    """Traceback of a failure, or the end of the log of a crash."""


@dataclass
class StageResult:
    """Results of one stage."""

    letter: str
    title: str

    outcome: str = "not run"
    """`not run`, `running`, `done`, `left out` or `cut off`."""

    reason: str = ""
    seconds: float = 0.0
    checks: list[CheckResult] = field(default_factory=list)

    def counts(self) -> str:
        """Count the checks by outcome, as text."""
        counted = Counter(check.outcome for check in self.checks)
        return ", ".join(f"{count} {outcome}" for outcome, count in counted.items())


@dataclass
class BringUp:
    """All results of one bring-up."""

    version: str
    started: str
    device: str
    stages: list[StageResult]
    seconds: float = 0.0

    ended: bool = False
    """Whether the bring-up came to its end; false in the files of one that was killed."""

    def write(self, folder: Path) -> None:
        """Replace `bringup.json` and `bringup.md` in a folder."""
        write_atomic(folder / "bringup.json", json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        write_atomic(folder / "bringup.md", self.to_markdown())

    @property
    def faults(self) -> int:
        """Number of checks that failed, crashed or hung."""
        return sum(check.outcome in FAULTS for stage in self.stages for check in stage.checks)

    def to_markdown(self) -> str:
        """Format as one page."""
        return "\n\n".join(self._sections()) + "\n"

    def _sections(self) -> Iterator[str]:
        yield f"# GPU bring-up of MVD-Scale {self.version}, {self.started}"
        if self.device == "cpu":
            yield "A dry run on the CPU with small sizes: no figure here says anything about a GPU."
        state = "It came to its end." if self.ended else "It was still running, or was cut off: `running` below."
        made = sum(len(stage.checks) for stage in self.stages)
        yield f"{self.faults} faults in {made} checks, {self.seconds:.0f} s. {state}"
        rows = [
            (f"({s.letter}) {s.title}", s.outcome, f"{s.seconds:.0f}", s.counts() or "none", s.reason)
            for s in self.stages
        ]
        yield table(("stage", "outcome", "s", "checks", "reason"), rows)
        for stage in self.stages:
            if stage.checks:
                yield f"## ({stage.letter}) {stage.title}"
                yield from _tables(stage.checks)
        for stage in self.stages:
            for check in stage.checks:
                if check.details:
                    yield f"## ({stage.letter}) {check.name}: {check.outcome}"
                    yield code(check.details)


def _tables(checks: list[CheckResult]) -> Iterator[str]:
    """Yield a table for all checks that have the same figures, which are its columns."""
    groups: dict[tuple[str, ...], list[CheckResult]] = {}
    for check in checks:
        groups.setdefault(tuple(check.figures), []).append(check)
    for names, group in groups.items():
        rows = [
            (check.name, check.outcome, f"{check.seconds:.1f}", *map(number, check.figures.values()), check.reason)
            for check in group
        ]
        yield table(("check", "outcome", "s", *names, "reason"), rows)
