"""`mvd-scale bench compare`: figures that became worse between two reports of the same measurement."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mvd_scale.errors import UserError
from mvd_scale.performance.benchmarks.checkpointing import CheckpointReport
from mvd_scale.performance.benchmarks.data.data_loading import DataReport
from mvd_scale.performance.benchmarks.data.evaluation import EvalReport
from mvd_scale.performance.benchmarks.data.manifest_size import ManifestReport
from mvd_scale.performance.benchmarks.endurance import EnduranceReport
from mvd_scale.performance.benchmarks.methods import MethodsReport
from mvd_scale.performance.benchmarks.rank_growth import RanksReport
from mvd_scale.performance.benchmarks.scaling import GrowthReport
from mvd_scale.performance.benchmarks.step import StepReport
from mvd_scale.performance.benchmarks.students import StudentsReport
from mvd_scale.performance.benchmarks.teacher_loading import LoadReport
from mvd_scale.performance.benchmarks.teachers import TeachersReport
from mvd_scale.performance.profiling.report import ProfileReport
from mvd_scale.performance.report import Machine, Metric, Report
from mvd_scale.performance.roofline.report import RooflineReport

KINDS: dict[str, type[Report]] = {
    "step": StepReport,
    "methods": MethodsReport,
    "data": DataReport,
    "eval": EvalReport,
    "load": LoadReport,
    "growth": GrowthReport,
    "ranks": RanksReport,
    "checkpoint": CheckpointReport,
    "endurance": EnduranceReport,
    "manifest": ManifestReport,
    "teachers": TeachersReport,
    "students": StudentsReport,
    "profile": ProfileReport,
    "roofline": RooflineReport,
}


@dataclass(frozen=True)
class Change:
    """One figure, in both reports."""

    name: str
    old: float
    new: float
    worse: bool
    better: bool

    @property
    def ratio(self) -> float:
        """New value divided by the old one; 1 if both are 0."""
        return self.new / self.old if self.old else (1.0 if not self.new else float("inf"))

    @property
    def mark(self) -> str:
        """Mark in the table: `WORSE`, `better` or empty."""
        return "WORSE" if self.worse else "better" if self.better else ""


@dataclass(frozen=True)
class ReportComparison:
    """All figures of both reports, and differences of versions."""

    kind: str
    tolerance: float
    changes: list[Change]
    versions: list[str]
    """Packages whose versions differ, with both versions."""

    @property
    def worse(self) -> list[Change]:
        """Figures that became worse by more than the tolerance."""
        return [change for change in self.changes if change.worse]

    def to_text(self) -> str:
        """Format as a table, one line per figure."""
        width = max(len(change.name) for change in self.changes)
        lines = [f"versions differ: {line}" for line in self.versions]
        lines.append(f"{self.kind:<{width}}{'old':>12}{'new':>12}{'ratio':>9}")
        lines += [
            f"{c.name:<{width}}{c.old:>12.4g}{c.new:>12.4g}{c.ratio:>9.3f}  {c.mark}".rstrip() for c in self.changes
        ]
        lines.append(f"{len(self.worse)} of {len(self.changes)} figures worse by more than {self.tolerance:.0%}")
        return "\n".join(lines)


def compare_reports(old: Path, new: Path, tolerance: float) -> ReportComparison:
    """Compare two files that `mvd-scale bench ... --json` printed, or `mvd-scale profile` wrote.

    Args:
        old: path of the earlier report.
        new: path of the later report.
        tolerance: relative change up to which a figure counts as unchanged.

    Raises:
        UserError: a file is not a report, or the two are of different kinds, settings or machines.
    """
    before, after = read_report(old), read_report(new)
    if before.kind != after.kind:
        raise UserError(
            f"{old} is of `bench {before.kind}`, {new} of `bench {after.kind}`: compare reports of one kind"
        )
    differing = _differences(before.setting(), after.setting())
    if differing:
        raise UserError(
            f"{old} and {new} have different settings: {'; '.join(differing)}. Measure both with the same settings"
        )
    places = _differences(_place(before.machine), _place(after.machine))
    versions = _differences(before.machine.versions, after.machine.versions)
    if places:
        also = f" (and {'; '.join(versions)})" if versions else ""
        raise UserError(
            f"{old} and {new} come from different machines: {'; '.join(places)}{also}. "
            "Measure both on one machine, with the same number of cores"
        )
    first, second = dict(before.values()), dict(after.values())
    only = sorted(first.keys() ^ second.keys())
    if only:
        raise UserError(f"{old} and {new} have different figures: {only[0]} is in only one of them. Measure both again")
    changes = [_change(name, value, second[name], tolerance) for name, value in first.items()]
    return ReportComparison(before.kind, tolerance, changes, versions)


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        UserError: the file is not a complete report.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): expected what `mvd-scale bench ... --json` prints") from error
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if kind not in KINDS:
        raise UserError(
            f"{path}: kind is {kind!r}, expected {', '.join(KINDS)} as `mvd-scale bench ... --json` writes it"
        )
    try:
        return TypeAdapter(KINDS[kind]).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} is not a complete report of `bench {kind}`: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def _place(machine: Machine) -> dict[str, Any]:
    return {key: getattr(machine, key) for key in ("device", "processor", "cores", "threads")}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*old, *new])
    both = ((name, old.get(name, "absent"), new.get(name, "absent")) for name in names)
    return [f"{name} {before} and {after}" for name, before, after in both if before != after]


def _change(name: str, old: Metric, new: Metric, tolerance: float) -> Change:
    """Compare one figure; it is judged if either report judges it, because a short part may have grown."""
    low, high = (new.value, old.value) if old.more_is_better else (old.value, new.value)
    judged = old.judged or new.judged
    return Change(
        name,
        old.value,
        new.value,
        worse=judged and high > low * (1 + tolerance),
        better=judged and low > high * (1 + tolerance),
    )
