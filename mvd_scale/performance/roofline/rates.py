"""Rates of this machine for the calls of a step, measured in rounds between its steps.

A rate is a limit, so a round makes every call a few times and takes the fastest: a slower one was disturbed. The first
round finds which way of a call is fastest; later rounds measure that way alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from mvd_kernels.bench.timing import seconds
from mvd_scale.performance.roofline.calls import Call

REPEATS = 3
"""Least number of timed repetitions of a call in a round, after one that is not timed."""

_SHORTEST = 0.05
"""Seconds that the repetitions take at least: more of short calls, which a short disturbance would spoil."""


@dataclass(frozen=True)
class Rate:
    """Time of one call by the fastest way."""

    way: str
    seconds: float


class RateMeter:
    """Meter of the calls of a step.

    Args:
        calls: calls to measure; each different one is measured once a round.
        device: device of the step.
    """

    def __init__(self, calls: Iterable[Call], device: torch.device) -> None:
        self.calls = list(dict.fromkeys(calls))
        self.device = device
        self._fastest: dict[Call, str] = {}

    def round(self) -> dict[Call, Rate]:
        """Measure every call."""
        return {call: self._measure(call) for call in self.calls}

    def _measure(self, call: Call) -> Rate:
        ways = call.ways(self.device)
        chosen = self._fastest.get(call)
        times = {way: _best(run, self.device) for way, run in ways.items() if chosen in (None, way)}
        way = self._fastest[call] = min(times, key=lambda name: times[name])
        return Rate(way, times[way])


def _best(run: Callable[[], object], device: torch.device) -> float:
    run()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < _SHORTEST:
        times.append(seconds(run, device))
    return min(times)
