"""Ranks of a large job as threads of one process, and a store that counts what they ask of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import HashStore, Store

from mvd_scale.distributed.process_group import Ranks

T = TypeVar("T")

RANKS_PER_HOST = 8


@dataclass
class Traffic:
    """Requests to a store."""

    requests: int = 0
    keys: int = 0
    """Keys that the requests name: a wait for n keys names n."""

    bytes: int = 0
    """Keys and values that are sent and received."""


class CountingStore:
    """Connection of one rank to a store that the ranks of a process share; counts its requests.

    Args:
        store: the shared store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.traffic = Traffic()
        self._lock = threading.Lock()

    def clone(self) -> CountingStore:
        """Another connection of the same rank, which counts with this one."""
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.store, name)

        def counted(*arguments: Any) -> Any:
            named = arguments[0] if isinstance(arguments[0], list) else arguments[:1]
            result = method(*arguments)
            values = (*named, *arguments[1:], *(result if isinstance(result, list) else [result]))
            with self._lock:
                self.traffic.requests += 1
                self.traffic.keys += len(named)
                self.traffic.bytes += sum(_size(value) for value in values)
            return result

        return counted


def _size(value: Any) -> int:
    """Bytes of a key or value on a connection; numbers have eight."""
    return len(value) if isinstance(value, str | bytes) else 8 if isinstance(value, int) else 0


@dataclass(frozen=True)
class SimulatedRank(Ranks):
    """Rank of a job that is a thread of this process."""

    connection: Any = field(default=None, compare=False)

    @property
    def store(self) -> Any:
        """Store of the job."""
        return self.connection


class SimulatedJob:
    """Job of so many ranks, `RANKS_PER_HOST` on each host, whose functions run in threads.

    Args:
        world_size: number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        shared = HashStore()
        self.connections = [CountingStore(shared) for _ in range(world_size)]
        self.ranks = [
            SimulatedRank(
                rank,
                rank % RANKS_PER_HOST,
                world_size,
                torch.device("cpu"),
                host=str(rank // RANKS_PER_HOST),
                connection=connection,
            )
            for rank, connection in enumerate(self.connections)
        ]

    def run(self, work: Callable[[Ranks], T]) -> list[T]:
        """Call a function on all ranks at once, and return the results in their order."""
        started = threading.Barrier(len(self.ranks))

        def on(rank: Ranks) -> T:
            started.wait()
            return work(rank)

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            return list(pool.map(on, self.ranks))

    def count(self, work: Callable[[Ranks], object]) -> Sequence[Traffic]:
        """Call a function on all ranks at once, and return the traffic of each."""
        for connection in self.connections:
            connection.traffic = Traffic()
        self.run(work)
        return [connection.traffic for connection in self.connections]
