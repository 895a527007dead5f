"""Fixtures: hosts of a job as threads of this process, which meet over a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from mvd_scale.doctor.meeting import Meeting, Seat

Meet = Callable[..., list[Any]]


def seat(rank: int, host: str | None = None, local_rank: int = 0, name: str = "", device: str = "cpu") -> Seat:
    return Seat(rank, local_rank, host or str(rank), name or f"node-{rank}", device)


@pytest.fixture
def meet() -> Meet:
    """Run a function on each of some hosts, given their meeting, and return the results in the order of hosts."""

    def run(count: int, work: Callable[[Meeting], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        store = HashStore()

        def on_host(rank: int) -> Any:
            meeting = Meeting(store, seat(rank))
            meeting.assemble(count, 10 if ranks is None else 0.3)
            return work(meeting)

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(on_host, range(count) if ranks is None else ranks))

    return run
