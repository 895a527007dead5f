"""Measurement of time and memory of the forward and backward passes of a case."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from mvd_kernels.bench.case import BenchmarkCase

PERCENTILES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Timing:
    """One row of the table.

    Attributes:
        way: name of the implementation.
        passes: `forward`, `backward` or `full` (both).
        milliseconds: 20th, 50th and 80th percentile of the time, ms.
        peak: peak of memory allocated beside the inputs, bytes; None on CPUs, where torch does not count it.
    """

    way: str
    passes: str
    milliseconds: tuple[float, float, float]
    peak: int | None


def time_case(case: BenchmarkCase, device: torch.device) -> Iterator[Timing]:
    """Time the forward pass, the backward pass and both, for every implementation."""
    for way, call in case.implementations.items():
        yield _timing(way, "forward", call, device)
        if not case.inputs:
            continue
        results = _results(call)
        upstream = [torch.randn_like(result) for result in results]
        backward = partial(torch.autograd.grad, results, case.inputs, upstream, retain_graph=True)
        yield _timing(way, "backward", backward, device)
        del results, backward
        yield _timing(way, "full", partial(_both, call, case.inputs, upstream), device)


def _both(call: Callable[[], Any], inputs: tuple[Tensor, ...], upstream: list[Tensor]) -> Any:
    return torch.autograd.grad(_results(call), inputs, upstream)


def _results(call: Callable[[], Any]) -> list[Tensor]:
    results = call()
    return list(results) if isinstance(results, tuple) else [results]


def _timing(way: str, passes: str, run: Callable[[], Any], device: torch.device) -> Timing:
    times = milliseconds(run, device)
    if device.type != "cuda":
        return Timing(way, passes, times, None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return Timing(way, passes, times, torch.cuda.max_memory_allocated() - before)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time one call of a function in seconds; on a GPU by its own clock, after all earlier work."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000


def milliseconds(run: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """Time a function, after a warm-up: 20th, 50th and 80th percentile, ms; on a GPU with its caches emptied."""
    if device.type != "cuda":
        return _host_times(run)
    from triton.testing import do_bench

    low, median, high = do_bench(run, quantiles=PERCENTILES)
    return low, median, high


def _host_times(run: Callable[[], Any], total: float = 0.5, least: int = 5) -> tuple[float, float, float]:
    run()
    times: list[float] = []
    while len(times) < least or sum(times) < total:
        times.append(seconds(run, torch.device("cpu")))
    low, median, high = torch.tensor(times).quantile(torch.tensor(PERCENTILES)).mul(1000).tolist()
    return low, median, high


@cache
def machine(device: torch.device) -> dict[str, str]:
    """Name of the device and versions of the packages, for the table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"CPU {platform.machine()} {capability}, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
    for package in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    return {"device": name, **versions}
