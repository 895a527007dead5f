"""Scheduling of this process's threads."""

from __future__ import annotations

import os
from pathlib import Path


def leave_real_time() -> None:
    """Give all threads of this process that have real-time priority the ordinary one again.

    The AV1 encoder SVT-AV1 takes the highest real-time priority for its threads and for the thread that opens it, where
    it may: as root, so in most containers. Nothing else then gets a CPU that they want, and child processes inherit it.
    """
    for task in Path("/proc/self/task").glob("*"):
        thread = int(task.name)
        try:
            if os.sched_getscheduler(thread) != os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        except ProcessLookupError:
            continue  # it has ended meanwhile
