"""Prediction of communication: the collectives of a step, their bytes, and their time on NVLink and the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mvd_scale.performance.planning.hardware import LINK_SHARE, Gpu
from mvd_scale.performance.planning.parallelism import SIZES, ParallelConfig
from mvd_scale.performance.planning.workload import Workload

Phase = Literal["teachers", "forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Collective:
    """One collective operation of a step; it can overlap with the arithmetic of its phase."""

    name: str
    phase: Phase
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]

    payload: int
    """Bytes of the unsharded tensors per call."""

    times: int
    """Calls per optimizer step."""

    sent: int
    """Bytes that a rank sends per step."""

    seconds: float
    """Seconds per step."""


def collectives(workload: Workload, parallel: ParallelConfig, gpu: Gpu, per_node: int) -> list[Collective]:
    """List the collectives of an optimizer step; none on a single rank.

    Args:
        workload: models of the step.
        parallel: ranks, accumulation and ZeRO settings.
        gpu: gives the bandwidths of the links.
        per_node: GPUs per machine.
    """
    if parallel.world == 1:
        return []
    size, often = SIZES[parallel.precision], parallel.accumulation
    student = workload.parameters * size
    found = []

    def add(
        name: str,
        phase: Phase,
        kind: Literal["all-gather", "reduce-scatter", "all-reduce"],
        payload: int,
        times: int,
        ranks: int = parallel.world,
    ) -> None:
        sent = payload * (2 if kind == "all-reduce" else 1) * (ranks - 1) // ranks
        seconds = times * seconds_of(kind, payload, ranks, min(per_node, ranks), gpu)
        found.append(Collective(name, phase, kind, payload, times, sent * times, seconds))

    for part, shards in zip(workload.teachers, parallel.shards, strict=True):
        if shards is not None:
            whole = part.unsharded if shards.whole_vectors else 0
            payload = (part.parameters - whole) * SIZES[parallel.teacher_precision]
            add(f"{part.name}'s weights", "teachers", "all-gather", payload, often, shards.ranks)
    if parallel.stage == 3:
        weights = (workload.parameters - workload.unsharded) * size
        add("weights, forward", "forward", "all-gather", weights, often)
        # Weights beyond the limit of live parameters are released after the forward pass and gathered again.
        again = max(weights - size * parallel.zero["stage3_max_live_parameters"], 0)
        if again:
            add("weights, backward", "backward", "all-gather", again, often)
        add("gradients", "backward", "reduce-scatter", student, often)
    else:
        # DeepSpeed reduces a bucket that several ranks own by one all-reduce; stage 1 only before the optimizer step.
        add("gradients", "backward", "all-reduce", student, 1 if parallel.stage == 1 else often)
        add("updated weights", "optimizer", "all-gather", student, 1)
    return found


def seconds_of(kind: str, payload: int, world: int, per_node: int, gpu: Gpu) -> float:
    """Seconds of a large ring collective: NVLink within a machine, all its network cards between machines.

    Args:
        kind: name of the collective; an all-reduce is a reduce-scatter and an all-gather.
        payload: bytes of the unsharded tensors.
        world: number of ranks.
        per_node: ranks per machine.
        gpu: gives the bandwidths of the links.
    """
    nodes = world // per_node
    inside = payload * (world - 1) / world / gpu.nvlink if per_node > 1 else 0.0
    between = payload * (nodes - 1) / nodes / (per_node * gpu.network)
    return (2 if kind == "all-reduce" else 1) * max(inside, between) / LINK_SHARE
