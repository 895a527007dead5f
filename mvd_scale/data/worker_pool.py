"""Worker processes for work on videos, so that a video that crashes its decoder ends one worker and nothing else."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import connection
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

MAX_INLINE_ITEMS = 16
"""Items per worker up to which this process does the work itself: starting processes would take longer."""


def run_chunks(
    work: Callable[[Sequence[In]], list[Out]],
    chunks: Iterable[Sequence[In]],
    workers: int,
    on_crash: Callable[[In], Out],
    *,
    inline_limit: int | None = None,
) -> Iterator[tuple[Sequence[In], list[Out]]]:
    """Apply `work` to each chunk of items in worker processes.

    Args:
        work: picklable function that returns one result for each item of a chunk.
        chunks: the items, in chunks that take about a second each; few are taken before they are worked on.
        workers: number of worker processes.
        on_crash: function that returns the result for an item whose worker process died.
        inline_limit: number of items per worker up to which no process is started; `MAX_INLINE_ITEMS` if None.

    Yields:
        a chunk and its results, in the order in which chunks are done.
    """
    coming = iter(chunks)
    limit = (MAX_INLINE_ITEMS if inline_limit is None else inline_limit) * workers
    first, items = [], 0
    for chunk in coming:
        first.append(chunk)
        items += len(chunk)
        if items > limit:
            break
    else:
        yield from ((chunk, work(chunk)) for chunk in first)
        return
    todo = chain(first, coming)
    while True:
        running: dict[Future[list[Out]], Sequence[In]] = {}
        with _pool(workers) as pool:
            try:
                # Two chunks per worker are in flight, so that no worker waits and little is lost in a crash.
                for chunk in islice(todo, 2 * workers):
                    running[_submit(pool, work, chunk)] = chunk
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield running[future], future.result()
                        del running[future]
                        for chunk in islice(todo, 1):
                            running[_submit(pool, work, chunk)] = chunk
                return
            except BrokenProcessPool:
                lost = list(running.values())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        # A dead worker breaks the whole pool and does not name its item: the chunks in flight run again, item by item.
        for chunk in lost:
            yield chunk, _one_by_one(work, chunk, on_crash)


def _submit(
    pool: ProcessPoolExecutor, work: Callable[[Sequence[In]], list[Out]], chunk: Sequence[In]
) -> Future[list[Out]]:
    """Result to come of a chunk; that of a broken pool says so when it is asked for, so that no chunk is forgotten."""
    try:
        return pool.submit(work, chunk)
    except BrokenProcessPool as error:
        failed: Future[list[Out]] = Future()
        failed.set_exception(error)
        return failed


def _one_by_one(
    work: Callable[[Sequence[In]], list[Out]], things: Sequence[In], on_crash: Callable[[In], Out]
) -> list[Out]:
    """Apply `work` to single items in one worker process, which is restarted after each item that kills it."""
    results: list[Out] = []
    while len(results) < len(things):
        with _pool(1) as pool:
            try:
                for thing in things[len(results) :]:
                    results += pool.submit(work, [thing]).result()
            except BrokenProcessPool:
                results.append(on_crash(things[len(results)]))
    return results


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: a forked copy of a process with DALI or torch threads may hang.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=exit_with_parent)


def exit_with_parent() -> None:
    """Make a worker process ignore SIGINT and SIGUSR1, and exit as soon as its parent process ends for any reason.

    Both signals may reach all processes of a job; a rank needs its workers until it has saved a checkpoint.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Numbers of parameters in glibc's `malloc.h`."""


def keep_freed_memory() -> None:
    """Let the C library keep up to 128 MiB that a worker has freed, in one arena for all threads.

    By default it hands the memory of every clip back and gets it again page by page: 1,500 page faults and a sixth of
    the time of a clip of 340x256, 9,000 of one of 1280x720. Other C libraries than glibc are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that is allowed
        mallopt(_M_TRIM_THRESHOLD, 128 * 2**20)
        mallopt(_M_ARENA_MAX, 1)  # each clip is decoded in a thread of its own


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
