"""Attribution of a step's time to the parts of the model, their passes, and kinds of work, from the profiler's trace.

Every moment of the step belongs to the innermost event that contains it, so the times of all places add up to the step.
The backward pass of a part is found by autograd's sequence numbers: a node has the number of the operator that made it.
On a GPU the time of a kernel belongs to the place that launched it; of kernels that run at the same time, it belongs to
the one that started first, and to communication only where nothing is computed.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mvd_scale.performance.profiling.trace import LAUNCHES, ON_DEVICE, STEP

Kind = Literal["products", "attention", "memory", "rest"]
"""Kind of work: `memory` are norms, activations, sums and copies, which memory limits; `rest` computes nothing."""

Passes = Literal["forward", "backward", ""]
"""Pass of a part; empty for parts that belong to no model."""

_NODE = "autograd::engine::evaluate_function: "
_PRODUCTS = re.compile(
    r"aten::(mm|addmm|bmm|baddbmm|linear|_scaled_mm|_int_mm)(\.|$)|onednn::qlinear|mvd_quantize|_Linear(Backward)?$"
)
_ATTENTION = re.compile(r"attention|flash|fmha", re.IGNORECASE)
_MEMORY = re.compile(r"aten::|mvd_")
_PRODUCT_KERNELS = re.compile(r"gemm|nvjet|cutlass|xmma|cublas", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """One cell of the attribution."""

    part: str
    passes: Passes
    kind: Kind

    def __str__(self) -> str:
        return f"{self.part}, {self.passes}" if self.passes else self.part


OUTSIDE = Place("loss and rest", "forward", "rest")
"""Place of what no annotation encloses."""

GRADIENTS = Place("gradients", "", "memory")
"""Place of what the backward pass does beside the model: gradients are added up and handed to DeepSpeed."""

IDLE = Place("GPU idle", "", "rest")
"""Place of the time in which a GPU neither computes nor communicates."""

COMMUNICATION = Place("communication", "", "rest")
"""Place of the time in which a GPU only communicates."""


def attribute(events: list[dict[str, Any]], parts: Mapping[str, Place], elapsed: float) -> dict[Place, float]:
    """Divide the time of one step among its places.

    Args:
        events: events of the trace, which contains one step.
        parts: places by the names of annotations; within an annotation of a model's pass, operators are divided by
            their kind. Of nested annotations the inner one counts.
        elapsed: seconds of the step from the end of all earlier work to the end of its own.

    Returns:
        seconds by place; their sum is `elapsed`.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    step = next(event for event in complete if event["name"] == STEP)
    within = [event for event in complete if step["ts"] <= event["ts"] < step["ts"] + step["dur"]]
    host = [event for event in within if event.get("cat") in ("cpu_op", "user_annotation", *LAUNCHES)]
    sweep = _HostSweep(parts)
    sweep.add(event for event in host if event["tid"] == step["tid"])
    kernels = [event for event in complete if event.get("cat") in ON_DEVICE]
    if kernels:
        # Autograd has a thread for each GPU.
        sweep.add(event for event in host if event["tid"] != step["tid"])
        seconds, beside = _device_seconds(kernels, sweep.launched), IDLE
    else:
        seconds, beside = dict(sweep.seconds), OUTSIDE
    seconds[beside] = seconds.get(beside, 0.0) + elapsed - sum(seconds.values())
    return seconds


def kind_of(name: str) -> Kind:
    """Return the kind of work of an operator of the host."""
    if _PRODUCTS.match(name):
        return "products"
    if _ATTENTION.search(name):
        return "attention"
    return "memory" if _MEMORY.match(name) else "rest"


class _HostSweep:
    """Pass over the nested events of host threads in order of time."""

    def __init__(self, parts: Mapping[str, Place]) -> None:
        self.parts = parts
        self.seconds: dict[Place, float] = defaultdict(float)
        self.launched: dict[int, Place] = {}
        """Place that launched a kernel, by the correlation of the trace."""
        self._part_of_node: dict[int, str] = {}

    def add(self, events: Iterable[dict[str, Any]]) -> None:
        """Add the self times of events, and remember the places of launches."""
        stacks: dict[Any, list[tuple[float, Place]]] = defaultdict(list)
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            start, stack = event["ts"], stacks[event["tid"]]
            while stack and stack[-1][0] <= start:
                stack.pop()
            around = stack[-1][1] if stack else OUTSIDE
            if event["cat"] in LAUNCHES:
                self.launched[event["args"].get("correlation")] = around
                continue
            place = self._place(event, around)
            end = start + event["dur"]
            if stack:
                # Times of the trace are rounded, so an event may seem to outlast the one around it.
                end = min(end, stack[-1][0])
                self.seconds[around] -= (end - start) / 1e6
            self.seconds[place] += (end - start) / 1e6
            stack.append((end, place))

    def _place(self, event: dict[str, Any], around: Place) -> Place:
        name, number = event["name"], event.get("args", {}).get("Sequence number")
        if event["cat"] == "user_annotation" and name in self.parts:
            return self.parts[name]
        if name.startswith(_NODE):
            if name.endswith("AccumulateGrad"):
                return GRADIENTS
            return Place(self._part_of_node.get(number, OUTSIDE.part), "backward", "rest")
        if number is not None and around.passes != "backward":
            # The latest operator with a number is the one that made the node; those before it made none.
            self._part_of_node[number] = around.part
        return _refined(around, kind_of(name))


def _refined(around: Place, kind: Kind) -> Place:
    """Return the place of an operator of some kind in a place; what attention and products call belongs to them."""
    kept = around.kind in ("attention", "products") or kind == "rest"
    return around if not around.passes or kept else replace(around, kind=kind)


def _device_seconds(kernels: list[dict[str, Any]], launched: dict[int, Place]) -> dict[Place, float]:
    """Divide the time in which kernels run among the places that launched them."""
    placed = [(_placed(kernel, launched), kernel["ts"], kernel["ts"] + kernel["dur"]) for kernel in kernels]
    placed.sort(key=lambda kernel: kernel[1])
    seconds: dict[Place, float] = defaultdict(float)
    covered = _Cover()
    for talks in (False, True):
        for place, start, end in placed:
            if (place == COMMUNICATION) == talks:
                seconds[place] += covered.add(start, end) / 1e6
    return dict(seconds)


def _placed(kernel: dict[str, Any], launched: dict[int, Place]) -> Place:
    name, place = kernel["name"], launched.get(kernel["args"].get("correlation"), OUTSIDE)
    if "nccl" in name.lower():
        return COMMUNICATION
    if place.kind in ("products", "attention"):
        return place
    if _ATTENTION.search(name):
        return _refined(place, "attention")
    return _refined(place, "products" if _PRODUCT_KERNELS.search(name) else "memory")


class _Cover:
    """Union of intervals."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._starts: list[float] = []

    def add(self, start: float, end: float) -> float:
        """Add an interval, and return how much of it was not covered."""
        first = bisect_left(self._ends, start)
        last = first
        new = end - start
        low, high = start, end
        while last < len(self._starts) and self._starts[last] <= end:
            new -= max(min(end, self._ends[last]) - max(start, self._starts[last]), 0.0)
            low, high = min(low, self._starts[last]), max(high, self._ends[last])
            last += 1
        self._starts[first:last], self._ends[first:last] = [low], [high]
        return new
