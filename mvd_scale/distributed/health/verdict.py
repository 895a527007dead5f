"""Judgement on the ranks of a run from their heartbeats: which of them hang, are gone, or hold up the others."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from mvd_scale.distributed.health.progress import Position

_NAMED = 4
"""Number of ranks that a message names one by one."""


@dataclass(frozen=True)
class Member:
    """Process of a rank."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True)
class Verdict:
    """Reason to end a run, and how."""

    message: str
    code: int
    """Exit code of the ranks."""

    ranks: tuple[int, ...]
    """Ranks at fault; empty if none can be told."""

    hangs: bool = False
    """Whether processes hang: then they write their stacks and end at once."""

    def to_json(self) -> str:
        """Serialise as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Convert the JSON of a verdict back."""
        values = json.loads(text)
        return cls(**values | {"ranks": tuple(values["ranks"])})


@dataclass
class Heartbeats:
    """Heartbeats of ranks, with the time at which each last changed by the clock of the reader.

    Times are those of `time.monotonic` on the host that reads: clocks of hosts are never compared.
    """

    positions: dict[int, Position] = field(default_factory=dict)
    seen: dict[int, float] = field(default_factory=dict)
    """Time of the latest new heartbeat of each rank."""

    moved: dict[int, float] = field(default_factory=dict)
    """Time of the latest progress of each rank."""

    _numbers: dict[int, str] = field(default_factory=dict)

    def record(self, rank: int, beat: str, now: float) -> None:
        """Record what a rank has published: the number of its heartbeat and its position."""
        number, _, text = beat.partition(" ")
        if self._numbers.get(rank) == number:
            return
        self._numbers[rank] = number
        self.seen[rank] = now
        position = Position.parse(text)
        if self.positions.get(rank) != position:
            self.positions[rank] = position
            self.moved[rank] = now

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks without a new heartbeat for this long."""
        return sorted(rank for rank, seen in self.seen.items() if now - seen > seconds)

    def hang(self, now: float, seconds: float) -> bool:
        """Whether no rank has made progress for this long, times its patience; false while any may take any time."""
        patience = [position.patience for position in self.positions.values()]
        return 0 not in patience and now - max(self.moved.values()) > seconds * max(patience)

    def late(self) -> list[int]:
        """Ranks that have entered the fewest phases, and of these begun the fewest collectives; empty if all have."""
        places = {rank: (position.arrivals, position.collectives) for rank, position in self.positions.items()}
        last = min(places.values())
        late = sorted(rank for rank, place in places.items() if place == last)
        return [] if len(late) == len(self.positions) else late


def name_ranks(ranks: list[int], members: Mapping[int, Member]) -> str:
    """Name ranks with their hosts and processes, such as `rank 3 (host node-2, pid 71)`."""
    if len(ranks) > _NAMED:
        hosts: dict[str, list[int]] = defaultdict(list)
        for rank in ranks:
            hosts[members[rank].host].append(rank)
        named = [f"{len(them)} on host {host}" for host, them in list(hosts.items())[:_NAMED]]
        more = f" and on {len(hosts) - _NAMED} other hosts" if len(hosts) > _NAMED else ""
        return f"{len(ranks)} ranks ({', '.join(named)}{more})"
    return ", ".join(f"rank {rank} (host {members[rank].host}, pid {members[rank].pid})" for rank in ranks)


def name_phases(ranks: list[int], positions: Mapping[int, Position]) -> str:
    """Name the phases of ranks, the most frequent one first."""
    count: dict[str, int] = defaultdict(int)
    for rank in ranks:
        count[positions[rank].description] += 1
    named = sorted(count, key=lambda phase: -count[phase])
    return " and ".join(named[:2]) + (f" and {len(named) - 2} other phases" if len(named) > 2 else "")
