"""Work on videos in processes of its own, so that a video that kills its reader kills nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

FEW = 16
"""So many things a worker are done sooner here than processes start."""


def run_chunks(
    work: Callable[[Sequence[In]], list[Out]],
    chunks: Sequence[Sequence[In]],
    workers: int,
    crashed: Callable[[In], Out],
    *,
    few: int | None = None,
) -> Iterator[tuple[int, list[Out]]]:
    """Apply `work` to each chunk, in parallel.

    Args:
        work: picklable; gives one result for each thing of a chunk.
        chunks: the things, in portions of a second or so.
        workers: processes.
        crashed: the result for a thing that ends its process.
        few: things per worker up to which no process is started; `FEW` if None.

    Yields:
        number of a chunk and its results, in the order in which they are done.
    """
    if sum(map(len, chunks)) <= (FEW if few is None else few) * workers:
        yield from ((number, work(chunk)) for number, chunk in enumerate(chunks))
        return
    todo = iter(range(len(chunks)))
    while True:
        running: dict[Future[list[Out]], int] = {}
        with _pool(workers) as pool:
            try:
                for number in islice(todo, 2 * workers):
                    running[pool.submit(work, chunks[number])] = number
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield running[future], future.result()
                        del running[future]
                        for number in islice(todo, 1):
                            running[pool.submit(work, chunks[number])] = number
                return
            except BrokenProcessPool:
                lost = list(running.values())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for number in lost:
            yield number, _one_by_one(work, chunks[number], crashed)


def _one_by_one(
    work: Callable[[Sequence[In]], list[Out]], things: Sequence[In], crashed: Callable[[In], Out]
) -> list[Out]:
    results: list[Out] = []
    while len(results) < len(things):
        with _pool(1) as pool:
            try:
                for thing in things[len(results) :]:
                    results += pool.submit(work, [thing]).result()
            except BrokenProcessPool:
                results.append(crashed(things[len(results)]))
    return results


def _pool(workers: int) -> ProcessPoolExecutor:
    # A fork of a process that runs DALI or torch may hang.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=follow_parent)


def follow_parent() -> None:
    """In a process that another one started: leave Ctrl-C to that one, and end when it ends, however that happens."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
