"""Cost of what watches a run: phases, heartbeats, the look for a request to stop, and events."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mvd_scale.distributed.health.verdict import Member
from mvd_scale.distributed.health.watchdog import Watchdog
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.training.preemption import PreemptionHandler
from mvd_scale.utils.events import EventLog

_CALLS = 2000
_PHASES = ("data wait", "forward", "backward", "optimizer", "metrics", "callbacks", "save")
"""Phases that a step without accumulation enters."""


def time_watching(ranks: Ranks, scratch: Path, *, step_seconds: float, steps_per_event: float) -> dict[str, float]:
    """Measure the seconds per step that each part of the watching takes, if nothing ran beside it.

    All ranks call it, so that the store answers all of them.

    Args:
        ranks: this process among all.
        scratch: folder of this rank for events.
        step_seconds: seconds of a step, by which heartbeats are shared out.
        steps_per_event: steps from one event to the next.
    """
    events = EventLog(scratch / "events.jsonl")
    watchdog, handler = Watchdog(ranks, scratch, events, minutes=5), PreemptionHandler()

    def enter_phases() -> None:
        for phase in _PHASES:
            ranks.progress.enter(phase, 1)

    costs = {
        "phases": _seconds(enter_phases),
        "request to stop": _seconds(lambda: handler.should_stop(ranks, 0)),
        "events": _seconds(lambda: events.write("save", step=1)) / steps_per_event,
    }
    if ranks.world_size > 1:
        watchdog.connect(Member(ranks.rank, ranks.host, 1))
        costs["heartbeats"] = _seconds(watchdog.exchange) * step_seconds / watchdog.interval
    return costs


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(_CALLS):
        work()
    return (time.perf_counter() - started) / _CALLS
