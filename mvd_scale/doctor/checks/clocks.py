"""Difference of the clocks of hosts, measured by messages over the store.

A host asks, and rank 0 answers with its time. The answer was written between question and receipt, so the middle of
both is wrong by half the round trip at most. The quickest of some round trips counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from mvd_scale.doctor.findings import Finding
from mvd_scale.doctor.meeting import Meeting, NoAnswer

_ROUND_TRIPS = 8
_PATIENCE = 5.0
"""Seconds that either side waits for the other's next message."""

_NOTICED = 0.5
"""Seconds of difference that confuse times of files and logs.

Runs compare no clocks of hosts: who waits for a renewal of a lease or for a sign of life counts seconds on its own
clock. Of torchrun only the rendezvous c10d does, which counts a host that is 15 s behind as dead; the launch files use
the static one."""


@dataclass(frozen=True)
class RoundTrip:
    """Question of a host and answer of rank 0: times in seconds since 1970, by the clocks of both."""

    asked: float
    answered: float
    """By the clock of rank 0."""
    received: float

    @property
    def error(self) -> float:
        """Largest error of `ahead`, in seconds."""
        return (self.received - self.asked) / 2

    @property
    def ahead(self) -> float:
        """Seconds by which the host's clock is ahead of that of rank 0."""
        return (self.asked + self.received) / 2 - self.answered


def compare_clocks(meeting: Meeting, ready: Iterable[int]) -> Iterator[Finding]:
    """Measure the clock of every host against that of rank 0, one after the other. All hosts call it.

    Args:
        meeting: meeting of the hosts.
        ready: ranks of the hosts that take part.

    Raises:
        NoAnswer: rank 0 does not answer in time.
    """
    others = [rank for rank in ready if rank != 0]
    if meeting.leads:
        yield Finding("clock", "ok", "the others are compared with it", figures={"ahead": 0.0, "error": 0.0})
        for rank in others:
            with suppress(NoAnswer):  # that host finds so itself
                _answer(meeting, rank)
        return
    # The hosts before this one may take their whole time.
    meeting.get(f"clock/{meeting.seat.rank}/turn", _PATIENCE * (others.index(meeting.seat.rank) + 2))
    yield judge([_ask(meeting, number) for number in range(_ROUND_TRIPS)])


def _answer(meeting: Meeting, rank: int) -> None:
    meeting.put(f"clock/{rank}/turn", True)
    for number in range(_ROUND_TRIPS):
        meeting.get(f"clock/{rank}/{number}/question", _PATIENCE)
        meeting.put(f"clock/{rank}/{number}/answer", time.time())


def _ask(meeting: Meeting, number: int) -> RoundTrip:
    key = f"clock/{meeting.seat.rank}/{number}"
    asked = time.time()
    meeting.put(f"{key}/question", True)
    return RoundTrip(asked, meeting.get(f"{key}/answer", _PATIENCE), time.time())


def judge(trips: list[RoundTrip]) -> Finding:
    """Judge the difference of a clock, by the quickest round trip."""
    best = min(trips, key=lambda trip: trip.error)
    ahead, error = best.ahead, best.error
    said = f"{abs(ahead) * 1e3:.1f} ms {'ahead of' if ahead > 0 else 'behind'} rank 0, within {error * 1e3:.1f} ms"
    figures = {"ahead": ahead, "error": error}
    if abs(ahead) - error < _NOTICED:
        return Finding("clock", "ok", said, figures=figures)
    harm = "no run depends on it, but times in logs and of files, and ages in `mvd-scale status`, are wrong by as much"
    remedy = "start a time service on every host (chrony or systemd-timesyncd) against the same server"
    return Finding("clock", "warning", f"{said}: {harm}", remedy, figures)
