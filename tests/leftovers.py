"""Processes and ports that are still there when a job has ended, on one host and on the hosts of `two_hosts`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

LISTENING = "0A"
"""State of a listening socket in /proc/net/tcp."""

TCP_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def find_processes(belongs: Callable[[int], bool]) -> list[psutil.Process]:
    """All living processes whose number a function takes; it may raise `OSError` for one that has ended."""
    found = []
    for process in psutil.process_iter():
        # A process that ends meanwhile, or waits for its parent to take its exit code, is none.
        with suppress(OSError, psutil.NoSuchProcess):
            if belongs(process.pid) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def group_processes(group: int) -> list[psutil.Process]:
    """Living processes of a process group, those whose parents have ended as well."""
    return find_processes(lambda pid: os.getpgid(pid) == group)


def wait_until_gone(find: Callable[[], list[psutil.Process]], seconds: float) -> None:
    """Wait until a function finds no process any more.

    Raises:
        AssertionError: some are left after these seconds.
    """
    deadline = time.monotonic() + seconds
    while left := find():
        assert time.monotonic() < deadline, f"left after {seconds:.0f} s: {[_words(process) for process in left]}"
        time.sleep(0.05)


def listening_ports(tables: str) -> set[int]:
    """TCP ports that are held by a listening process, by the text of `TCP_TABLES`."""
    rows = [row.split() for row in tables.splitlines()]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENING}


def _words(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return f"{process.pid}: {' '.join(process.cmdline())[-200:]}"
    return f"{process.pid} has ended"
