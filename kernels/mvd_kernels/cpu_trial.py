"""Trial of the ways in which this CPU can compute with bfloat16.

A trial decides, since neither the flags of a CPU nor those of oneDNN tell throughputs. One thread makes it, by its CPU
time, which hardly depends on other processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar, get_args

import torch
from torch import Tensor

from mvd_kernels.cpu_attention import AttentionWay, AttentionWays, cpu_attention, possible_ways
from mvd_kernels.linear import ProductWay, input_gradient, product, weight_gradient

Way = TypeVar("Way", bound=str)

_REPEATS = 5
"""Number of timed calls each way, after one that is not timed; the fastest counts."""

_ROWS, _WIDTH = 256, 768
_TOKENS, _HEADS, CHANNELS = 784, 2, 64

SHAPES = {
    "products": f"{_ROWS} x {_WIDTH} x {_WIDTH}",
    "attention": f"{_HEADS} heads of {CHANNELS}, {_TOKENS} tokens",
}
"""Shapes of the calls of a trial, in words."""


def time_products() -> dict[str, dict[ProductWay, float]]:
    """CPU seconds of the products of a linear layer: {field of `LinearWays`: {way: seconds}}."""
    rows, gradients, weight = _random(_ROWS, _WIDTH), _random(_ROWS, _WIDTH), _random(_WIDTH, _WIDTH)
    calls: dict[str, Callable[[ProductWay], Tensor]] = {
        "forward": partial(product, rows, weight, None),
        "input_gradient": partial(input_gradient, gradients, weight),
        "weight_gradient": partial(weight_gradient, gradients, rows),
    }
    ways: tuple[ProductWay, ...] = get_args(ProductWay)
    return {name: _cpu_seconds({way: partial(call, way) for way in ways}) for name, call in calls.items()}


def time_attention() -> dict[str, dict[AttentionWay, float]]:
    """CPU seconds of the passes of attention: {field of `AttentionWays`: {way: seconds}}."""
    qkv = _random(1, _TOKENS, 3, _HEADS, CHANNELS).requires_grad_()
    ways = possible_ways(CHANNELS)
    forward = {way: partial(cpu_attention, qkv, _TOKENS, AttentionWays(way, way)) for way in ways}
    attended = {way: attend() for way, attend in forward.items()}
    upstream = _random(1, _TOKENS, _HEADS, CHANNELS)
    backward = {
        way: partial(torch.autograd.grad, made, qkv, upstream, retain_graph=True) for way, made in attended.items()
    }
    return {"forward": _cpu_seconds(forward), "backward": _cpu_seconds(backward)}


def _random(*shape: int) -> Tensor:
    # The generator of the process must give the model the same numbers with and without a trial.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def _cpu_seconds(calls: Mapping[Way, Callable[[], object]]) -> dict[Way, float]:
    """CPU seconds of the fastest of some calls each way; ways take turns, so that a disturbance meets all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in calls.values():
            run()
        times: dict[Way, list[float]] = {way: [] for way in calls}
        for _ in range(_REPEATS):
            for way, run in calls.items():
                started = time.thread_time()
                run()
                times[way].append(time.thread_time() - started)
        return {way: min(taken) for way, taken in times.items()}
    finally:
        torch.set_num_threads(threads)
