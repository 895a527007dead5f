"""Processes that launched this rank. A rank whose launcher was killed would train on without anybody to end it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


class LauncherProcesses:
    """Processes that launched this one: its parents as far as they are Python programs, such as `deepspeed`.

    Shells and services above them do not count: a job that was started with `nohup` outlives its terminal.
    """

    def __init__(self) -> None:
        self._processes = []
        for process in psutil.Process().parents():
            try:
                if not Path(process.exe()).name.startswith(("python", "pypy")):
                    break
            except psutil.Error:
                break
            self._processes.append(process)
        self._parent = os.getppid()

    def ended(self) -> int | None:
        """Number of a process that launched this one and has ended; None if all of them live."""
        if self._processes and os.getppid() != self._parent:
            return self._parent
        return next((process.pid for process in self._processes if _has_ended(process)), None)


def _has_ended(process: psutil.Process) -> bool:
    try:
        # A process whose parent does not take its exit code is kept in the table as a zombie.
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
