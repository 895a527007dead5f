"""Judgement on the ranks of a run from their heartbeats: which of them hang, are gone, or hold up the others."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from mvd_scale.distributed.health.progress import WRITING_PATIENCE, Position
from mvd_scale.errors import FAULT_CODE
from mvd_scale.utils.machine import ProcessSpace, is_running, process_start

_ADVICE = "The same command resumes from the last checkpoint"

_NAMED = 4
"""Number of ranks that a message names one by one."""


@dataclass(frozen=True)
class Member:
    """Process of a rank."""

    rank: int
    host: str
    pid: int
    start: int | None = None
    """Start of the process, by which it differs from a later one of the same number: see `process_start`."""

    space: ProcessSpace | None = None
    """Machine and PID namespace in which the number of the process means this process."""

    @classmethod
    def own(cls, rank: int) -> Self:
        """Member that is this process."""
        space, pid = ProcessSpace.own(), os.getpid()
        return cls(rank, space.host, pid, process_start(pid), space)

    @property
    def name(self) -> str:
        """Name for messages, such as `rank 3 (host node-2, pid 71)`."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def lives(self) -> bool:
        """Whether the process is running; only for a process of the own space."""
        return is_running(self.pid, self.start)

    def to_json(self) -> str:
        """Serialise as JSON."""
        return json.dumps([self.rank, self.host, self.pid, self.start, self.space])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Convert the JSON of a member back."""
        rank, host, pid, start, space = json.loads(text)
        return cls(rank, host, pid, start, space and ProcessSpace(*space))


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

    told: bool = False
    """Whether a rank that failed by an exception reports it itself."""

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

    written: dict[int, float] = field(default_factory=dict)
    """Time of the latest progress of each rank in writing a checkpoint."""

    _numbers: dict[int, str] = field(default_factory=dict)

    def record(self, rank: int, beat: str, now: float) -> None:
        """Record what a rank has published: the number of its heartbeat and its position."""
        number, _, text = beat.partition(" ")
        if self._numbers.get(rank) == number:
            return
        self._numbers[rank] = number
        self.seen[rank] = now
        before, position = self.positions.get(rank), Position.parse(text)
        if before is None or before.written != position.written:
            self.written[rank] = now
        if before != position:
            self.positions[rank] = position
            self.moved[rank] = now

    def restart(self, now: float) -> None:
        """Count the time without heartbeats and progress from now on."""
        for times in (self.seen, self.moved, self.written):
            times.update(dict.fromkeys(times, now))

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks without a new heartbeat for this long."""
        return sorted(rank for rank, seen in self.seen.items() if now - seen > seconds)

    def hang(self, now: float, seconds: float) -> bool:
        """Whether no rank has made progress for this long, times its patience; false while any may take any time."""
        patience = [position.patience for position in self.positions.values()]
        return 0 not in patience and now - max(self.moved.values()) > seconds * max(patience)

    def late(self) -> list[int]:
        """Ranks that have entered the fewest phases, and of these begun the fewest collectives; empty if all have.

        Of ranks that have begun as many, those that have written the fewest parts of checkpoints.
        """
        places = {rank: (at.arrivals, at.collectives, at.parts) for rank, at in self.positions.items()}
        last = min(places.values())
        late = sorted(rank for rank, place in places.items() if place == last)
        return [] if len(late) == len(self.positions) else late

    def late_writers(self, now: float, seconds: float) -> list[int]:
        """Ranks that hold up the writing of a checkpoint, in which no rank has made progress for this long.

        The time is multiplied by `WRITING_PATIENCE`. Ranks that have written their part wait for those that have not.
        """
        writers = [rank for rank, position in self.positions.items() if position.writing]
        # Of all ranks: that one has ended its part is progress too.
        if not writers or now - max(self.written.values()) <= seconds * WRITING_PATIENCE:
            return []
        fewest = min(self.positions[rank].parts for rank in writers)
        return sorted(rank for rank in writers if self.positions[rank].parts == fewest)


def name_ranks(ranks: list[int], members: Mapping[int, Member]) -> str:
    """Name ranks with their hosts and processes, many of them by the number of each host."""
    if len(ranks) > _NAMED:
        hosts: dict[str, list[int]] = defaultdict(list)
        for rank in ranks:
            hosts[members[rank].host].append(rank)
        named = [f"{len(them)} on host {host}" for host, them in list(hosts.items())[:_NAMED]]
        more = f" and on {len(hosts) - _NAMED} other hosts" if len(hosts) > _NAMED else ""
        return f"{len(ranks)} ranks ({', '.join(named)}{more})"
    return ", ".join(members[rank].name for rank in ranks)


def name_phases(ranks: list[int], positions: Mapping[int, Position]) -> str:
    """Name the phases of ranks, the most frequent one first."""
    count: dict[str, int] = defaultdict(int)
    for rank in ranks:
        count[positions[rank].description] += 1
    named = sorted(count, key=lambda phase: -count[phase])
    return " and ".join(named[:2]) + (f" and {len(named) - 2} other phases" if len(named) > 2 else "")


def gone_verdict(ranks: list[int], beats: Heartbeats, members: Mapping[int, Member]) -> Verdict:
    """Verdict on ranks whose processes have ended."""
    message = (
        f"{name_ranks(ranks, members)} ended without a message{_last_seen(ranks, beats)}: killed, or out of memory"
    )
    return Verdict(f"{message}. {_ADVICE}", FAULT_CODE, tuple(ranks))


def silent_verdict(ranks: list[int], seconds: float, beats: Heartbeats, members: Mapping[int, Member]) -> Verdict:
    """Verdict on ranks that have sent no heartbeat for so many seconds."""
    message = (
        f"no sign of life of {name_ranks(ranks, members)} for {seconds:.0f} s{_last_seen(ranks, beats)}: "
        "the process is stopped or killed, its host is down, or the link is cut"
    )
    return Verdict(f"{message}. {_ADVICE}", FAULT_CODE, tuple(ranks), hangs=True)


def hang_verdict(seconds: float, faults: Path, beats: Heartbeats, members: Mapping[int, Member]) -> Verdict:
    """Verdict on a run in which no rank has made progress for so many seconds; it names those the others wait for."""
    late = beats.late()
    ranks = late or sorted(beats.positions)
    message = f"no progress for {seconds:.0f} s: {name_ranks(ranks, members)} did not leave "
    message += name_phases(ranks, beats.positions)
    if others := sorted(set(beats.positions) - set(ranks)):
        message += f", and the others wait in {name_phases(others, beats.positions)}"
    message += f". Python stacks are in {faults}. {_ADVICE}; training.hang_minutes sets the limit"
    return Verdict(message, FAULT_CODE, tuple(late), hangs=True)


def writing_verdict(
    ranks: list[int], seconds: float, faults: Path, beats: Heartbeats, members: Mapping[int, Member]
) -> Verdict:
    """Verdict on ranks that have not written their part of a checkpoint, and for so many seconds nothing of it."""
    step = min(beats.positions[rank].writing for rank in ranks)
    message = (
        f"no progress for {seconds:.0f} s in writing the checkpoint after step {step} beside the training: "
        f"{name_ranks(ranks, members)} did not leave 'save' of step {step}. Python stacks are in {faults}. {_ADVICE}; "
        f"the limit is {WRITING_PATIENCE} times training.hang_minutes"
    )
    return Verdict(message, FAULT_CODE, tuple(ranks), hangs=True)


def main_verdict(how: str, beats: Heartbeats, members: Mapping[int, Member], *, hangs: bool) -> Verdict:
    """Verdict of another rank on rank 0, such as that it `has ended`."""
    message = f"{name_ranks([0], members)} {how}{_last_seen([0], beats)}. {_ADVICE}"
    return Verdict(message, FAULT_CODE, (0,), hangs=hangs)


def _last_seen(ranks: list[int], beats: Heartbeats) -> str:
    phases = name_phases([rank for rank in ranks if rank in beats.positions], beats.positions)
    return f", last seen in {phases}" if phases else ""
