"""Timing of loaders: each in a separate process, after a warm-up."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from itertools import islice
from typing import Any, TypeVar

import psutil

T = TypeVar("T")


def run_in_subprocess(work: Callable[..., T], *arguments: Any) -> T:
    """Call `work(*arguments)` in a new process and return its result, so that measurements do not affect each other."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def time_batches(batches: Iterator[Any], warm_up: int, steps: int) -> tuple[float, float]:
    """Measure the seconds per batch, and CPU seconds per batch of this process and its children.

    Args:
        batches: iterator to time.
        warm_up: batches that are not timed.
        steps: batches that are timed.
    """
    for _ in islice(batches, warm_up):
        pass
    cpu, started = cpu_seconds(), time.perf_counter()
    done = sum(1 for _ in islice(batches, steps))
    spent, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    return spent / done, cpu / done


def cpu_seconds() -> float:
    """CPU seconds that this process and its children have used so far."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the given packages that are installed, by name."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
