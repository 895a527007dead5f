"""How loaders are timed: each in a process of its own, after a start that does not count."""

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


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` returns in a new process: what one way leaves behind does not slow the next one down."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def time_batches(batches: Iterator[Any], warm_up: int, steps: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and its children, of one of `steps` batches."""
    for _ in islice(batches, warm_up):
        pass
    cpu, started = cpu_seconds(), time.perf_counter()
    done = sum(1 for _ in islice(batches, steps))
    spent, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    return spent / done, cpu / done


def cpu_seconds() -> float:
    """CPU seconds of this process and its children so far."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
