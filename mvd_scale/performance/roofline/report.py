"""Report of `bench step --roofline`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mvd_scale.performance.profiling.attribution import Kind, Passes, Place
from mvd_scale.performance.report import SHORT, Metric, Report
from mvd_scale.performance.roofline.calls import Call
from mvd_scale.performance.roofline.rates import REPEATS, Rate
from mvd_scale.performance.roofline.work import Work

_SHOWN = 0.005
"""Share of the step up to which rows of the table are merged to one."""


@dataclass(frozen=True)
class RooflineRow:
    """One kind of work in one pass of one part of the step."""

    part: str
    passes: Passes
    kind: Kind

    work: float
    """FLOPs of products and attention; bytes that memory-bound operators must read and write."""

    limit_milliseconds: float
    """Time of the work at the rates of this machine."""

    milliseconds: float
    """Time as measured under the profiler."""

    @property
    def difference(self) -> float:
        """Milliseconds beyond the limit."""
        return self.milliseconds - self.limit_milliseconds

    @property
    def label(self) -> str:
        """Part and pass."""
        return str(Place(self.part, self.passes, self.kind))


@dataclass(frozen=True)
class RateRow:
    """Rate of one call."""

    call: str
    way: str
    """Way that was the fastest."""

    kind: Kind
    work: float
    """FLOPs, or bytes read and written, of one call."""

    milliseconds: float
    calls_per_step: float


@dataclass(frozen=True, kw_only=True)
class RooflineReport(Report):
    """Roofline of a recipe's step on rank 0: the figures of one round, so that they add up."""

    kind: Literal["roofline"] = "roofline"
    recipe: str
    overrides: list[str]
    precision: str
    teacher_precision: str
    teacher_sharding: str
    ranks: int
    clips_per_step: int
    milliseconds_per_step: float
    """Milliseconds of the step without the profiler."""

    profiled_milliseconds: float
    """Milliseconds of the step under the profiler, which the rows sum up to."""

    limit_milliseconds: float
    """Milliseconds of the work at the rates of this machine."""

    share: float
    """Share of the limit: `limit_milliseconds` divided by `milliseconds_per_step`."""

    shares: list[float]
    """Shares of all rounds; the report is of the round with the median."""

    rows: list[RooflineRow]
    """Rows by falling difference."""

    rates: list[RateRow]

    def setting(self) -> dict[str, Any]:
        """Return the recipe, its overrides, and the conditions of the run."""
        keys = (
            "recipe", "overrides", "precision", "teacher_precision", "teacher_sharding", "ranks", "clips_per_step",
        )  # fmt: skip
        return {key: getattr(self, key) for key in keys}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield the share of the limit, the times of step and limit, and the times of every part and kind."""
        yield "share of the limit", Metric(self.share, more_is_better=True)
        yield "step, ms", Metric(self.milliseconds_per_step)
        yield "limit, ms", Metric(self.limit_milliseconds, judged=False)
        for name, rows in (*self._sums(lambda row: row.part), *self._sums(lambda row: row.kind)):
            spent = sum(row.milliseconds for row in rows)
            yield f"{name}, ms", Metric(spent, judged=spent > SHORT * self.profiled_milliseconds)

    def to_text(self) -> str:
        """Format as tables: rows by falling difference, sums by part and by kind, and the range of the rates."""
        overhead = self.profiled_milliseconds / self.milliseconds_per_step - 1
        rounds = ", ".join(f"{share:.1%}" for share in self.shares)
        lines = [
            f"{self.recipe}, {self.precision}, teachers {self.teacher_precision} {self.teacher_sharding}, "
            f"{self.ranks} ranks, {self.clips_per_step} clips per step",
            *([f"with {' '.join(self.overrides)}"] if self.overrides else []),
            self.machine.title(),
            "",
            f"share of the limit  {self.share:.1%}: {self.limit_milliseconds:.0f} of "
            f"{self.milliseconds_per_step:.0f} ms (rounds: {rounds})",
            f"under the profiler  {self.profiled_milliseconds:.0f} ms ({overhead:+.1%})",
            "",
            *self._table("part", self._shown()),
            "",
            *self._table("by part", self._sums(lambda row: row.part)),
            "",
            *self._table("by kind", self._sums(lambda row: row.kind)),
            "",
            f"rates: fastest of at least {REPEATS} calls in the round",
            *self._rate_lines(),
        ]
        return "\n".join(lines)

    def _shown(self) -> list[tuple[str, list[RooflineRow]]]:
        short = [row for row in self.rows if row.milliseconds < _SHOWN * self.profiled_milliseconds]
        shown = [(f"{row.label}: {row.kind}", [row]) for row in self.rows if row not in short]
        return [*shown, *([(f"{len(short)} shorter ones", short)] if short else []), ("step", self.rows)]

    def _sums(self, key: Callable[[RooflineRow], str]) -> list[tuple[str, list[RooflineRow]]]:
        groups: dict[str, list[RooflineRow]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return sorted(groups.items(), key=lambda group: -sum(row.difference for row in group[1]))

    def _table(self, title: str, groups: list[tuple[str, list[RooflineRow]]]) -> Iterator[str]:
        yield f"{title:<44}{'GFLOP':>10}{'GB':>9}{'limit ms':>11}{'ms':>10}{'difference':>12}{'of step':>9}"
        for label, rows in groups:
            flops = sum(row.work for row in rows if row.kind != "memory") / 1e9
            traffic = sum(row.work for row in rows if row.kind == "memory") / 1e9
            limit, spent = (sum(getattr(row, key) for row in rows) for key in ("limit_milliseconds", "milliseconds"))
            amounts = f"{f'{flops:.4g}' if flops else '':>10}{f'{traffic:.3g}' if traffic else '':>9}"
            share = spent / self.profiled_milliseconds
            yield f"{label:<44}{amounts}{limit:>11.1f}{spent:>10.1f}{spent - limit:>12.1f}{share:>9.1%}"

    def _rate_lines(self) -> Iterator[str]:
        groups: dict[tuple[Kind, str], list[float]] = {}
        for rate in self.rates:
            groups.setdefault((rate.kind, rate.way), []).append(rate.work / rate.milliseconds / 1e6)
        for (kind, way), rates in groups.items():
            unit = "GB/s" if kind == "memory" else "GFLOP/s"
            shapes = f"{len(rates)} shapes" if len(rates) > 1 else "1 shape"
            yield f"  {kind:<12}{way:<22}{shapes:>10}{min(rates):>12.4g} to {max(rates):.4g} {unit}"


def make_rows(work: list[Work], rates: Mapping[Call, Rate], measured: Mapping[Place, float]) -> list[RooflineRow]:
    """Set the work and its time at the machine's rates beside the measured seconds, by place, largest difference first.

    Args:
        work: work of the step.
        rates: rate of every call of the work.
        measured: seconds of the step by place.
    """
    amounts: Counter[Place] = Counter()
    limits: Counter[Place] = Counter()
    for one in work:
        amounts[one.place] += one.amount  # type: ignore[assignment]
        limits[one.place] += one.count * rates[one.call].seconds  # type: ignore[assignment]
    rows = [
        RooflineRow(
            place.part, place.passes, place.kind, amounts[place], 1000 * limits[place], 1000 * measured.get(place, 0.0)
        )
        for place in {**dict.fromkeys(measured), **dict.fromkeys(amounts)}
    ]
    return sorted(rows, key=lambda row: -row.difference)


def make_rates(work: list[Work], rates: Mapping[Call, Rate]) -> list[RateRow]:
    """List the rate of every call with its number in a step, the largest share of the limit first."""
    counts: Counter[Call] = Counter()
    for one in work:
        counts[one.call] += one.count  # type: ignore[assignment]
    rows = [
        RateRow(str(call), rate.way, call.kind, call.work, 1000 * rate.seconds, counts[call])
        for call, rate in rates.items()
    ]
    return sorted(rows, key=lambda row: -row.calls_per_step * row.milliseconds)
