"""Which CPUs each rank computes on, where ranks compute on CPUs.

A CPU is a hardware thread, as Linux numbers them; a core has one or more of them, a NUMA node some cores. Ranks divide
cores evenly, but are bound to NUMA nodes only: that keeps their memory near, while within a node the scheduler moves
them away from what other programs do. Bound to its cores, a rank waits for those programs, and all others for it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("mvd_scale")

CPUs = frozenset[int]

SYSTEM = Path("/sys/devices/system")
"""Where Linux tells of CPUs and of NUMA nodes."""


class Share(NamedTuple):
    """Of a rank in its machine."""

    cpus: CPUs
    """Its part of them, whole cores: so many are for it and its data workers."""
    home: CPUs
    """All CPUs of the NUMA nodes that they are of: where it runs, and its data workers."""
    threads: int
    """Of torch."""


@dataclass(frozen=True)
class Pinned:
    """A rank that keeps to its home among the CPUs that were given to it."""

    given: CPUs
    share: Share

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """A `with` block whose thread, and whose child processes, may use all CPUs, as the other ranks wait."""
        os.sched_setaffinity(0, self.given)
        try:
            yield
        finally:
            pin(self.share.home)


def settle(rank: int, threads: int | None) -> Pinned:
    """Give this rank its share of its machine. All ranks call it, once they have met.

    Every thread that there is already is moved; threads and processes that come later, such as torch's and the data
    workers, inherit the place. Rank 0 logs the shares of its machine.

    Args:
        rank: this one.
        threads: of torch, if the user has chosen; if None, one for each core of the share.
    """
    given = frozenset(os.sched_getaffinity(0))
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (machine(), given, threads))
    shares = share_out({other: cpus for other, (place, cpus, _) in enumerate(everyone) if place == machine()})
    shares = {other: share._replace(threads=everyone[other][2] or share.threads) for other, share in shares.items()}
    pin(shares[rank].home)
    torch.set_num_threads(shares[rank].threads)
    if rank == 0:
        logger.info("CPUs by rank: %s", ", ".join(f"{other}: {_describe(share)}" for other, share in shares.items()))
    return Pinned(given, shares[rank])


def share_out(given: Mapping[int, CPUs], system: Path = SYSTEM) -> dict[int, Share]:
    """The share of every rank of a machine, by rank.

    Ranks that were given the very same CPUs divide them. A rank whose CPUs differ from those of all others keeps them:
    somebody has chosen them (numactl, Slurm, `deepspeed --bind_cores_to_rank`). So no rank leaves what it was given,
    and every CPU that was given to some rank stays in use.

    Args:
        given: the CPUs that each rank may use.
        system: where the kernel tells of cores and nodes.
    """
    shares: dict[int, Share] = {}
    for cpus in set(given.values()):
        together = [rank for rank, others in given.items() if others == cpus]
        shares |= zip(together, divide(cores_by_node(cpus, system), len(together)), strict=True)
    return {rank: shares[rank] for rank in given}


def divide(nodes: Sequence[Sequence[CPUs]], ranks: int) -> list[Share]:
    """Neighbouring cores for every rank, whole ones, and a thread for each of them; one core more or less at most.

    The larger shares go where the fewest ranks straddle NUMA nodes, then to the first ranks. More ranks than cores
    share them: each has one, with one thread.

    Args:
        nodes: the cores of each node.
        ranks: number of ranks.
    """
    cores = [core for node in nodes for core in node]
    if ranks > len(cores):
        parts = [[cores[rank * len(cores) // ranks]] for rank in range(ranks)]
    else:
        sizes = _sizes(len(cores), ranks, list(accumulate(map(len, nodes))))
        parts = [cores[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
    homes = [_union(core for node in nodes if set(node) & set(part) for core in node) for part in parts]
    return [Share(_union(part), home, threads=len(part)) for part, home in zip(parts, homes, strict=True)]


def _union(parts: Iterable[CPUs]) -> CPUs:
    return frozenset().union(*parts)


def _sizes(cores: int, ranks: int, borders: Sequence[int]) -> tuple[int, ...]:
    smaller, larger = divmod(cores, ranks)
    # By the number of larger shares so far: minus the borders that were crossed, and the sizes.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for rank in range(ranks):
        grown: dict[int, tuple[int, tuple[int, ...]]] = {}
        for before, (crossed, sizes) in best.items():
            first = rank * smaller + before
            for more in range(min(larger - before, 1) + 1):
                size = smaller + more
                way = (crossed - sum(first < border < first + size for border in borders), (*sizes, size))
                grown[before + more] = max(way, grown.get(before + more, way))
        best = grown
    return best[larger][1]


def cores_by_node(cpus: CPUs, system: Path = SYSTEM) -> list[list[CPUs]]:
    """The cores of each NUMA node, as far as they are among some CPUs; all in ascending order.

    Where the kernel does not tell, as in some containers, every CPU is a core, and all are of one node.
    """
    node_of = {
        cpu: int(file.parent.name.removeprefix("node"))
        for file in (system / "node").glob("node[0-9]*/cpulist")
        for cpu in parse_cpus(file.read_text())
    }
    nodes: dict[int, list[CPUs]] = defaultdict(list)
    for cpu in sorted(cpus):
        file = system / f"cpu/cpu{cpu}/topology/thread_siblings_list"
        core = parse_cpus(file.read_text()) & cpus if file.is_file() else frozenset({cpu})
        if cpu == min(core):
            nodes[node_of.get(cpu, 0)].append(core)
    return [nodes[node] for node in sorted(nodes)]


def pin(cpus: CPUs) -> None:
    """Move all threads of this process to some CPUs."""
    for thread in os.listdir("/proc/self/task"):
        # One may have ended meanwhile.
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cpus)


def parse_cpus(text: str) -> CPUs:
    """The kernel's way to write CPUs: `0-3,8`."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))


def format_cpus(cpus: CPUs) -> str:
    """The inverse of `parse_cpus`."""
    firsts = sorted(cpu for cpu in cpus if cpu - 1 not in cpus)
    lasts = sorted(cpu for cpu in cpus if cpu + 1 not in cpus)
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def _describe(share: Share) -> str:
    return f"{format_cpus(share.home)} ({share.threads} thread{'s' if share.threads > 1 else ''})"


def machine() -> tuple[str, str]:
    """Tells machines apart, even those of one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.is_file() else ""
