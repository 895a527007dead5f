"""`mvd-scale bench ranks`: growth of a job's traffic, files and computations with its number of ranks.

Ranks are threads that run the functions of a real run on a store that counts (`simulated_ranks`). No model computes:
what grows is what ranks tell each other, and what rank 0 does for all.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from mvd_scale.checkpoints.tensor_folder import DESCRIPTION, complete_description, write_description_part
from mvd_scale.config import ModelConfig
from mvd_scale.config.training import CheckpointConfig
from mvd_scale.data.loaders.dali_failures import WINDOW, DaliFailures
from mvd_scale.distributed.cpu_affinity import count_cpus
from mvd_scale.distributed.health.progress import Progress
from mvd_scale.distributed.process_group import Ranks, barrier_via_store, run_on_rank0
from mvd_scale.models import Encoder
from mvd_scale.performance.benchmarks.scaling import PowerLaw
from mvd_scale.performance.benchmarks.simulated_ranks import SimulatedJob, Traffic
from mvd_scale.performance.report import Metric, Report, this_machine
from mvd_scale.training.checkpointing.pieces import Pieces, PiecesSavePlanner, State
from mvd_scale.training.checkpointing.writer import CheckpointWriter
from mvd_scale.training.preemption import PreemptionHandler

_LINEAR = 1.1
"""Largest fitted power that counts as linear: small numbers of ranks bend a line."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cost of the whole job at several numbers of ranks."""

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
        """Whether the cost of the whole job grows at most linearly, so that no rank's share grows."""
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
        head = f"  {'cost of the whole job':<{width}}" + "".join(f"{f'{count} ranks':>12}" for count in counts)
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
    for stage in (2, 3):
        plans = {ranks: plan_checkpoint("B", ranks, stage, scratch) for ranks in sorted(numbers)}
        for field, unit in (("pieces", "pieces"), ("bytes", "bytes"), ("planning", "s of a rank"), ("merging", "s")):
            points = {ranks: float(getattr(plan, field)) for ranks, plan in plans.items()}
            costs.append(Cost(f"checkpoint of B, ZeRO {stage}: {field}", unit, points))
    return RanksReport(
        machine=this_machine(torch.device("cpu")),
        target=target,
        microseconds_per_request=time_request(),
        costs=costs,
    )


def conversations(world_size: int, folder: Path) -> Iterator[tuple[str, Sequence[Traffic]]]:
    """Yield every conversation of a run's ranks over the store, and the traffic of each rank.

    Args:
        world_size: number of ranks.
        folder: folder for checkpoints.
    """
    job = SimulatedJob(world_size)
    exchanges = job.run(lambda ranks: ranks.open_exchange())
    handlers = job.run(lambda ranks: PreemptionHandler())
    writers = job.run(lambda ranks: CheckpointWriter(folder, ranks, CheckpointConfig()))
    failures = job.run(lambda ranks: DaliFailures("cpu", 0, None, ranks.open_exchange()))
    # The first windows are not collected yet, or not forgotten.
    job.run(lambda ranks: failures[ranks.rank].advance(2 * WINDOW))

    def save(ranks: Ranks) -> None:
        writer = writers[ranks.rank]
        run_on_rank0(ranks, "room for step 1", lambda: writer.make_room(1, 0))
        piece = Pieces.of_range(torch.zeros(4), 4 * ranks.rank, (4 * ranks.world_size,))
        writer.start(1, {"model.weight": piece}, {})
        writer.wait()

    talks: dict[str, Callable[[Ranks], object]] = {
        "start: CPUs of the ranks": lambda ranks: count_cpus(ranks.open_exchange()),
        "start: what rank 0 finds": lambda ranks: run_on_rank0(ranks, "prepared", lambda: None),
        "start: digests of all ranks": lambda ranks: exchanges[ranks.rank].decide("digests", "0" * 64, len),
        "step: request to stop": lambda ranks: handlers[ranks.rank].should_stop(ranks, 0),
        f"{WINDOW} steps: failures of DALI": lambda ranks: failures[ranks.rank].advance(3 * WINDOW),
        "save": save,
        "end of an evaluation": lambda ranks: barrier_via_store(ranks, "evaluated"),
    }
    for name, talk in talks.items():
        yield name, job.count(talk)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Description of a checkpoint, and the time that it takes."""

    pieces: int
    bytes: int
    """Size of the description of all pieces."""

    planning: float
    """Seconds in which a rank plans its own pieces."""

    merging: float
    """Seconds in which rank 0 merges the descriptions of all ranks."""


def plan_checkpoint(size: str, world_size: int, stage: int, scratch: Path) -> Plan:
    """Plan the checkpoint of an encoder on so many ranks; no tensor is written.

    Args:
        size: S, B, L or H.
        world_size: number of ranks.
        stage: ZeRO stage: below 3 the ranks cut the parameters in a row, at 3 each parameter.
        scratch: folder for descriptions.
    """
    folder = scratch / f"{size} {world_size} {stage}"
    folder.mkdir()
    with torch.device("meta"):
        encoder = Encoder(ModelConfig.model_validate({"size": size}))
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    planned = 0.0
    for rank in range(world_size):
        state = {
            f"{kind}.{name}": pieces
            for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
            for name, pieces in _share(shapes, rank, world_size, stage).items()
        }
        started = time.perf_counter()
        planner = PiecesSavePlanner(Progress())
        planner.set_up_planner(state, is_coordinator=True)
        (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
        planned += time.perf_counter() - started
        place = _StorageInfo(f"__{rank}_0.distcp", 0, 0)
        write_description_part(folder, rank, metadata, [WriteResult(item.index, 0, place) for item in plan.items])
    started = time.perf_counter()
    complete_description(folder, world_size)
    merged = time.perf_counter() - started
    text = (folder / DESCRIPTION).read_text(encoding="utf-8")
    return Plan(text.count('"offsets"'), len(text), planned / world_size, merged)


def _share(shapes: dict[str, tuple[int, ...]], rank: int, world_size: int, stage: int) -> State:
    """Pieces of the parameters that a rank holds, without values."""
    cut, before = {}, 0
    whole = -(-sum(map(math.prod, shapes.values())) // world_size)
    for name, shape in shapes.items():
        count = math.prod(shape)
        size, first = (-(-count // world_size), 0) if stage == 3 else (whole, before)
        start, stop = (min(max(edge * size - first, 0), count) for edge in (rank, rank + 1))
        cut[name] = Pieces.of_range(torch.empty(stop - start, device="meta"), start, shape)
        before += count
    return cut


def time_request(requests: int = 5000) -> float:
    """Microseconds of a request to torch's store over one connection of this machine."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = time.perf_counter()
    for _ in range(requests):
        store.check(["nothing"])
    return 1e6 * (time.perf_counter() - started) / requests


def _requests(traffic: Sequence[Traffic]) -> float:
    return float(sum(of_rank.requests for of_rank in traffic))


def _bytes(traffic: Sequence[Traffic]) -> float:
    return float(sum(of_rank.bytes for of_rank in traffic))


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
