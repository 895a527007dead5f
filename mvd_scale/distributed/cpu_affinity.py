"""Binding of ranks that compute on CPUs to cores and NUMA nodes.

A CPU is a hardware thread, as Linux numbers them; a core has one or more CPUs, and a NUMA node has several cores. Ranks
divide the cores evenly, but are bound to NUMA nodes only. That keeps their memory local, while the scheduler can move
them within the node away from cores that other programs use. If a rank were bound to its cores, it would have to wait
for such programs, and all other ranks for it.

Ranks that compute on GPUs are not bound, but their data workers divide the CPUs by the same shares.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from mvd_scale.distributed.exchange import StoreExchange
from mvd_scale.utils.cpu_quota import cpu_quota

logger = logging.getLogger("mvd_scale")

CPUs = frozenset[int]

SYSTEM = Path("/sys/devices/system")
"""Folder in which Linux describes CPUs and NUMA nodes."""


class CpuShare(NamedTuple):
    """Share of one rank in its machine."""

    cpus: CPUs
    """CPUs of its part of the cores."""
    numa_cpus: CPUs
    """All CPUs of the NUMA nodes of `cpus`, to which the rank and its data workers are bound."""
    threads: int
    """Number of torch's threads."""
    budget: int
    """Number of CPUs that the rank and its data workers keep busy together: those of `cpus`, or fewer by a quota."""


@dataclass(frozen=True)
class CpuBinding:
    """Binding of a rank: the CPUs that the process was started with, and its share of them."""

    given: CPUs
    share: CpuShare

    @contextmanager
    def lifted_to_all_cpus(self) -> Iterator[None]:
        """Let this thread and its child processes use all CPUs in a `with` block, while other ranks wait."""
        os.sched_setaffinity(0, self.given)
        try:
            yield
        finally:
            set_affinity(self.share.numa_cpus)


def bind_to_cpus(exchange: StoreExchange, threads: int | None) -> CpuBinding:
    """Bind this rank to its share of its machine. All ranks must call it, after the process group is initialised.

    All existing threads are bound; threads and processes that are started later, such as torch's threads and data
    workers, inherit the binding. Rank 0 logs the shares of its machine.

    Args:
        exchange: exchange with all ranks, whose place is the machine of this rank.
        threads: number of torch's threads that the user chose; None for one per core of the share.
    """
    rank = exchange.rank
    given, shares = _gather_shares(exchange, threads)
    set_affinity(shares[rank].numa_cpus)
    torch.set_num_threads(shares[rank].threads)
    if rank == 0:
        logger.info("CPUs by rank: %s", ", ".join(f"{other}: {_describe(share)}" for other, share in shares.items()))
    return CpuBinding(given, shares[rank])


def count_cpus(exchange: StoreExchange) -> int:
    """Number of CPUs for this rank and its data workers, which are not bound. All ranks must call it."""
    return _gather_shares(exchange, None)[1][exchange.rank].budget


def count_own_cpus() -> int:
    """Number of CPUs of a process that shares them with no other rank."""
    cpus, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cpus if quota is None else min(cpus, max(int(quota), 1))


def _gather_shares(exchange: StoreExchange, threads: int | None) -> tuple[CPUs, dict[int, CpuShare]]:
    """Return the CPUs of this process, and the shares of all ranks of its machine. All ranks must call it."""
    given = frozenset(os.sched_getaffinity(0))
    here = exchange.gather("cpus", [format_cpus(given), threads])
    shares = partition_cpus({rank: parse_cpus(cpus) for rank, (cpus, _) in here.items()})
    shares = limit_to_quota(shares, cpu_quota())
    return given, {rank: share._replace(threads=here[rank][1] or share.threads) for rank, share in shares.items()}


def partition_cpus(given: Mapping[int, CPUs], system: Path = SYSTEM) -> dict[int, CpuShare]:
    """Compute the share of every rank of a machine, by rank.

    Ranks that were started with the same set of CPUs divide it. A rank whose set differs from all others keeps it,
    because it was chosen on purpose (numactl, Slurm, `deepspeed --bind_cores_to_rank`). So no rank leaves its set of
    CPUs, and every CPU of these sets remains in use.

    Args:
        given: CPUs that each rank was started with, by rank.
        system: folder in which Linux describes cores and NUMA nodes.
    """
    shares: dict[int, CpuShare] = {}
    for cpus in set(given.values()):
        together = [rank for rank, others in given.items() if others == cpus]
        shares |= zip(together, divide_cores(cores_by_node(cpus, system), len(together)), strict=True)
    return {rank: shares[rank] for rank in given}


def limit_to_quota(shares: Mapping[int, CpuShare], quota: float | None) -> dict[int, CpuShare]:
    """Limit the shares of the ranks of a machine to the CPU time of their container, which they divide evenly.

    More threads than that are stopped all together for the rest of each period, while the other ranks wait.

    Args:
        shares: shares of all ranks of the machine, by rank.
        quota: number of CPUs whose time the ranks may use together; None if it is not limited.
    """
    if quota is None:
        return dict(shares)
    most = max(int(quota / len(shares)), 1)
    return {
        rank: share._replace(threads=min(share.threads, most), budget=min(share.budget, most))
        for rank, share in shares.items()
    }


def divide_cores(nodes: Sequence[Sequence[CPUs]], ranks: int) -> list[CpuShare]:
    """Divide cores into contiguous shares, one per rank, whose sizes differ by at most one core.

    Which ranks get the larger shares is chosen so that the fewest ranks span several NUMA nodes; among equal choices
    the first ranks get them. If there are more ranks than cores, several ranks share a core, with one thread each.

    Args:
        nodes: cores of each NUMA node.
        ranks: number of ranks.

    Returns:
        a share per rank.
    """
    cores = [core for node in nodes for core in node]
    if ranks > len(cores):
        parts = [[cores[rank * len(cores) // ranks]] for rank in range(ranks)]
    else:
        sizes = _sizes(len(cores), ranks, list(accumulate(map(len, nodes))))
        parts = [cores[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
    numa_cpus_of_parts = [_union(core for node in nodes if set(node) & set(part) for core in node) for part in parts]
    return [
        CpuShare(_union(part), numa_cpus, threads=len(part), budget=len(_union(part)))
        for part, numa_cpus in zip(parts, numa_cpus_of_parts, strict=True)
    ]


def _union(parts: Iterable[CPUs]) -> CPUs:
    return frozenset().union(*parts)


def _sizes(cores: int, ranks: int, borders: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the ranks' shares, in cores.

    Minimises the number of NUMA borders inside of shares; of equal solutions the lexicographically largest one
    is taken, in which the first ranks have the larger shares.

    Args:
        cores: number of cores.
        ranks: number of ranks, at most `cores`.
        borders: cumulative number of cores at the end of each node.
    """
    smaller, larger = divmod(cores, ranks)
    # Dynamic programme over ranks. Where a share begins depends only on the number of larger shares before it, so the
    # best solution for each such number is enough: (minus the borders inside of shares, sizes), compared as a tuple.
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
    """Group CPUs by core and NUMA node, in ascending order.

    Where Linux gives no topology, as in some containers, every CPU counts as a core, and all belong to one node.

    Args:
        cpus: CPUs to group; others are left out.
        system: folder in which Linux describes cores and NUMA nodes.

    Returns:
        the cores of each node; a core is the set of its CPUs.
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


def set_affinity(cpus: CPUs) -> None:
    """Bind all threads of this process to some CPUs."""
    for thread in os.listdir("/proc/self/task"):
        # A thread of the list may have ended meanwhile.
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cpus)


def parse_cpus(text: str) -> CPUs:
    """Parse Linux's list format of CPUs, such as `0-3,8`."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))


def format_cpus(cpus: CPUs) -> str:
    """Format CPUs as a list of ranges, such as `0-3,8`; the inverse of `parse_cpus`."""
    firsts = sorted(cpu for cpu in cpus if cpu - 1 not in cpus)
    lasts = sorted(cpu for cpu in cpus if cpu + 1 not in cpus)
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def _describe(share: CpuShare) -> str:
    return f"{format_cpus(share.numa_cpus)} ({share.threads} thread{'s' if share.threads > 1 else ''})"
