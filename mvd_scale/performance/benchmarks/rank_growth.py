"""`mvd-scale bench ranks`: growth of a job's traffic, files and computations with its number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mvd_scale.performance.benchmarks.rank_conversations import conversations
from mvd_scale.performance.benchmarks.rank_work import plan_checkpoint, time_request, time_sampling
from mvd_scale.performance.benchmarks.scaling import PowerLaw
from mvd_scale.performance.benchmarks.simulated_ranks import Traffic
from mvd_scale.performance.report import Metric, Report, this_machine

_LINEAR = 1.1
"""Largest fitted power that counts as linear: small numbers of ranks bend a line."""

_FIGURES_OF_A_PLAN = (
    ("pieces", "", "pieces"),
    ("bytes", ": description", "bytes"),
    ("planning", ": planning by a rank", "s"),
    ("merging", ": merging by rank 0", "s"),
)
"""Field of `Plan`, name in the table and unit."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cost at several numbers of ranks, of the whole job unless its name says whose."""

    name: str
    unit: str
    points: dict[int, float]
    """Cost by number of ranks, ascending."""

    @property
    def power(self) -> float:
        """Power of the growth; 0 for a cost that is always zero."""
        if not all(self.points.values()):
            return 0.0
        return PowerLaw.of(list(self.points), list(self.points.values())).power

    def at(self, ranks: int) -> float:
        """Extrapolate from the largest number of ranks by the power."""
        largest = max(self.points)
        return self.points[largest] * (ranks / largest) ** self.power

    @property
    def is_linear(self) -> bool:
        """Whether the cost grows at most linearly; if it is of the whole job, no rank's share grows."""
        return self.power <= _LINEAR


@dataclasses.dataclass(frozen=True, kw_only=True)
class RanksReport(Report):
    """Costs of a job by its number of ranks."""

    kind: Literal["ranks"] = "ranks"
    target: int
    """Number of ranks to which the costs are extrapolated."""

    microseconds_per_request: float
    """Time of one request to torch's store on this machine, by one connection."""

    costs: list[Cost]

    def setting(self) -> dict[str, Any]:
        """Return the numbers of ranks."""
        return {"target": self.target, "ranks": [list(cost.points) for cost in self.costs]}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield the extrapolated costs; times, which are short, are not judged."""
        for cost in self.costs:
            yield f"{cost.name}, {cost.unit}", Metric(cost.at(self.target), judged=not cost.unit.startswith("s"))
        yield "request, microseconds", Metric(self.microseconds_per_request, judged=False)

    def to_text(self) -> str:
        """Format as a table, one line per cost."""
        counts = sorted({count for cost in self.costs for count in cost.points})
        width = max(len(f"{cost.name}, {cost.unit}") for cost in self.costs) + 2
        head = f"  {'cost':<{width}}" + "".join(f"{f'{count} ranks':>12}" for count in counts)
        lines = [self.machine.title(), f"{head}{'power':>8}{f'at {self.target}':>12}"]
        for cost in self.costs:
            shown = "".join(f"{_number(cost.points[count]) if count in cost.points else '':>12}" for count in counts)
            lines.append(
                f"  {f'{cost.name}, {cost.unit}':<{width}}{shown}{cost.power:>8.2f}{_number(cost.at(self.target)):>12}"
            )
        lines.append(f"  one request to torch's store takes {self.microseconds_per_request:.0f} microseconds")
        return "\n".join(lines)


def measure_ranks(numbers: Sequence[int], target: int, scratch: Path) -> RanksReport:
    """Run the conversations of a job on threads, and plan its checkpoints.

    Args:
        numbers: numbers of ranks, at least two.
        target: number of ranks to which the costs are extrapolated.
        scratch: folder for checkpoints.
    """
    traffic = {ranks: dict(conversations(ranks, scratch / f"{ranks}")) for ranks in sorted(numbers)}
    costs = [
        Cost(name, unit, {ranks: total(counted[name]) for ranks, counted in traffic.items()})
        for name in traffic[min(numbers)]
        for unit, total in (("requests", _requests), ("bytes", _bytes))
    ]
    sampling = {ranks: time_sampling(ranks) for ranks in sorted(numbers)}
    costs.append(Cost("sampling: a clip of a rank", "s", {n: each.seconds for n, each in sampling.items()}))
    costs.append(Cost("sampling: sampler of a rank", "bytes", {n: float(each.bytes) for n, each in sampling.items()}))
    for stage in (2, 3):
        plans = {ranks: plan_checkpoint("B", ranks, stage, scratch) for ranks in sorted(numbers)}
        for field, name, unit in _FIGURES_OF_A_PLAN:
            points = {ranks: float(getattr(plan, field)) for ranks, plan in plans.items()}
            costs.append(Cost(f"checkpoint of B, ZeRO {stage}{name}", unit, points))
    return RanksReport(
        machine=this_machine(torch.device("cpu")),
        target=target,
        microseconds_per_request=time_request(),
        costs=costs,
    )


def _requests(traffic: Sequence[Traffic]) -> float:
    return float(sum(of_rank.requests for of_rank in traffic))


def _bytes(traffic: Sequence[Traffic]) -> float:
    return float(sum(of_rank.bytes for of_rank in traffic))


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
