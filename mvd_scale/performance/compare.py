"""`mvd-scale bench compare`: what became slower or larger between two reports of the same measurement."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mvd_scale.errors import UserError
from mvd_scale.performance.data import DataReport
from mvd_scale.performance.growth import GrowthReport
from mvd_scale.performance.load import LoadReport
from mvd_scale.performance.methods import MethodsReport
from mvd_scale.performance.profile_report import ProfileReport
from mvd_scale.performance.reports import Machine, Report, Value
from mvd_scale.performance.step import StepReport
from mvd_scale.performance.teachers import TeachersReport
from mvd_scale.performance.testing import EvalReport

KINDS: dict[str, type[Report]] = {
    "step": StepReport,
    "methods": MethodsReport,
    "data": DataReport,
    "eval": EvalReport,
    "load": LoadReport,
    "growth": GrowthReport,
    "teachers": TeachersReport,
    "profile": ProfileReport,
}


@dataclass(frozen=True)
class Change:
    """One figure of both reports."""

    name: str
    old: float
    new: float
    worse: bool
    better: bool

    @property
    def ratio(self) -> float:
        """New to old; 1 where both are 0."""
        return self.new / self.old if self.old else (1.0 if not self.new else float("inf"))

    @property
    def mark(self) -> str:
        """What stands beside it."""
        return "WORSE" if self.worse else "better" if self.better else ""


@dataclass(frozen=True)
class Comparison:
    """All figures of both, and what else differs."""

    kind: str
    tolerance: float
    changes: list[Change]
    versions: list[str]
    """Packages whose versions differ, with both."""

    @property
    def worse(self) -> list[Change]:
        """Figures beyond the tolerance."""
        return [change for change in self.changes if change.worse]

    def to_text(self) -> str:
        """A line for every figure."""
        width = max(len(change.name) for change in self.changes)
        lines = [f"versions differ: {line}" for line in self.versions]
        lines.append(f"{self.kind:<{width}}{'old':>12}{'new':>12}{'ratio':>9}")
        lines += [
            f"{c.name:<{width}}{c.old:>12.4g}{c.new:>12.4g}{c.ratio:>9.3f}  {c.mark}".rstrip() for c in self.changes
        ]
        lines.append(f"{len(self.worse)} of {len(self.changes)} figures worse by more than {self.tolerance:.0%}")
        return "\n".join(lines)


def compare_reports(old: Path, new: Path, tolerance: float) -> Comparison:
    """Compare two files that `mvd-scale bench ... --json` printed, or `mvd-scale profile` wrote.

    Args:
        old: the earlier one.
        new: the later one.
        tolerance: relative change up to which a figure counts as the same.

    Raises:
        UserError: a file is no report, or the two are of different kinds, settings or machines.
    """
    before, after = read_report(old), read_report(new)
    if before.kind != after.kind:
        raise UserError(
            f"{old} is of `bench {before.kind}`, {new} of `bench {after.kind}`: compare reports of one kind"
        )
    differing = _differences(before.setting(), after.setting())
    if differing:
        raise UserError(f"{old} and {new} measured different things: {'; '.join(differing)}. Measure the same again")
    places = _differences(_place(before.machine), _place(after.machine))
    versions = _differences(before.machine.versions, after.machine.versions)
    if places:
        also = f" (and {'; '.join(versions)})" if versions else ""
        raise UserError(
            f"{old} and {new} come from different machines: {'; '.join(places)}{also}. "
            "Measure both on one machine, with as many cores"
        )
    first, second = dict(before.values()), dict(after.values())
    only = sorted(first.keys() ^ second.keys())
    if only:
        raise UserError(f"{old} and {new} have different figures: {only[0]} is in only one of them. Measure both again")
    changes = [_change(name, value, second[name], tolerance) for name, value in first.items()]
    return Comparison(before.kind, tolerance, changes, versions)


def read_report(path: Path) -> Report:
    """A report from its file.

    Raises:
        UserError: it is none.
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
            f"{path} is no whole report of `bench {kind}`: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def _place(machine: Machine) -> dict[str, Any]:
    return {key: getattr(machine, key) for key in ("device", "processor", "cores", "threads")}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*old, *new])
    both = ((name, old.get(name, "absent"), new.get(name, "absent")) for name in names)
    return [f"{name} {before} and {after}" for name, before, after in both if before != after]


def _change(name: str, old: Value, new: Value, tolerance: float) -> Change:
    """A figure counts as judged if it is so in either report: a part that grew is no longer short."""
    low, high = (new.value, old.value) if old.more_is_better else (old.value, new.value)
    judged = old.judged or new.judged
    return Change(
        name,
        old.value,
        new.value,
        worse=judged and high > low * (1 + tolerance),
        better=judged and low > high * (1 + tolerance),
    )
