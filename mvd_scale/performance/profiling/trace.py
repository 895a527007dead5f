"""Reader of Chrome traces of torch's profiler: parts of a step, communication and memory.

Times are seconds from the beginning of the first part or step; memory is in bytes.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "step"
"""Annotation around a whole step."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events that run on a GPU."""

LAUNCHES = ("cuda_runtime", "cuda_driver")
"""Categories of events of the host that launch them, by the argument `correlation`."""

_CPU, _CUDA = 0, 1
"""Device types of torch."""


@dataclass(frozen=True)
class Span:
    """Named time interval."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """Trace of the steps of one rank."""

    steps: list[Span]
    parts: list[Span]
    """Parts on the host in order of time; they do not overlap."""
    device_seconds: dict[str, float]
    """Seconds of GPU work by the part that launched it; empty on a CPU."""
    communication: list[Span]
    """Intervals of collectives: kernels of NCCL, or work of gloo's threads, which includes waiting."""
    memory: list[tuple[float, int]]
    """Samples (time, bytes of tensors): all tensors of a GPU; on a CPU those allocated since the trace began."""

    def seconds_of(self, part: str) -> float:
        """Host seconds of a part, summed over all steps."""
        return sum(span.seconds for span in self.parts if span.name == part)

    def part_at(self, moment: float) -> str:
        """Name of the part that contains a moment, or "between parts"."""
        inside = [span.name for span in self.parts if span.start <= moment <= span.end]
        return inside[0] if inside else "between parts"


def read_trace(path: Path, parts: Iterable[str]) -> Trace:
    """Read a trace that `torch.profiler.profile.export_chrome_trace` wrote with `profile_memory`.

    Args:
        path: path of the `.json.gz`.
        parts: names of the annotations that mark parts.
    """
    events = read_events(path)
    complete = [event for event in events if event.get("ph") == "X"]
    notes = [event for event in complete if event.get("cat") == "user_annotation"]
    names = set(parts)
    ours = sorted((_span(event) for event in notes if event["name"] in names), key=lambda span: span.start)
    steps = sorted((_span(event) for event in notes if event["name"] == STEP), key=lambda span: span.start)
    zero = min(span.start for span in (*steps, *ours))
    kernels = [event for event in complete if event.get("cat") in ON_DEVICE]
    talk = [event for event in kernels if "nccl" in event["name"].lower()]
    talk = talk or [event for event in notes if event["name"].startswith(("gloo:", "nccl:"))]
    return Trace(
        steps=[_from(zero, span) for span in steps],
        parts=[_from(zero, span) for span in ours],
        device_seconds=_device_seconds(ours, kernels, complete),
        communication=[_from(zero, _span(event)) for event in talk],
        memory=_memory(events, _CUDA if kernels else _CPU, zero),
    )


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read the events of a trace (`.json.gz`) as the profiler wrote them; times in microseconds."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def covered_seconds(spans: Iterable[Span]) -> float:
    """Seconds that are covered by at least one of the spans."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(span.end - max(span.start, end), 0.0)
        end = max(end, span.end)
    return total


def _device_seconds(parts: list[Span], kernels: list[dict[str, Any]], events: list[dict[str, Any]]) -> dict[str, float]:
    """Sum the GPU seconds by part; a kernel belongs to the part during which it was launched, by any thread."""
    launched = {
        event["args"]["correlation"]: event["ts"] / 1e6
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event["args"]
    }
    starts = [span.start for span in parts]
    seconds: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        moment = launched.get(kernel["args"].get("correlation"))
        if moment is None:
            continue
        place = bisect_right(starts, moment) - 1
        if place >= 0 and moment <= parts[place].end:
            seconds[parts[place].name] += kernel["dur"] / 1e6
    return dict(seconds)


def _memory(events: list[dict[str, Any]], device: int, zero: float) -> list[tuple[float, int]]:
    samples = [
        (event["ts"] / 1e6 - zero, int(event["args"]["Total Allocated"]))
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == device
    ]
    return sorted(samples)


def _span(event: dict[str, Any]) -> Span:
    start = event["ts"] / 1e6
    return Span(event["name"], start, start + event["dur"] / 1e6)


def _from(zero: float, span: Span) -> Span:
    return Span(span.name, span.start - zero, span.end - zero)
