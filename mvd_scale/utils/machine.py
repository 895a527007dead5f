"""Identity of this machine and of its processes, by which files tell a process that lives from one that is gone."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import NamedTuple


def machine_id() -> tuple[str, str]:
    """Identifier of this machine: host name and boot id, which differs between machines of the same name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.is_file() else ""


def processor_name() -> str:
    """Model name of the CPU in Linux's `/proc/cpuinfo`, or the architecture if there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class ProcessSpace(NamedTuple):
    """Machine and PID namespace, in which a process id means one process: containers of a machine differ in it."""

    host: str
    """Host name, for people."""

    boot: str
    """Boot id of the kernel."""

    pids: str
    """PID namespace, such as `pid:[4026531836]`."""

    @classmethod
    def own(cls) -> ProcessSpace:
        """Space of this process."""
        host, boot = machine_id()
        namespace = Path("/proc/self/ns/pid")
        return cls(host, boot.strip(), os.readlink(namespace) if namespace.is_symlink() else "")


def process_start(pid: int) -> int | None:
    """Start of a process of this space in clock ticks after the boot; None if it cannot be read.

    A process id is used again, but not with the same start. Ticks after the boot do not move when the clock is set.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    # A zombie has ended: only its parent has not asked for its exit code yet.
    return None if state in "ZX" else int(fields[18])


def is_running(pid: int, start: int | None) -> bool:
    """Whether the process of this space with this id and this start (see `process_start`) is running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # A process of another user, whose start may be hidden.
        return process_start(pid) in (start, None)
    return process_start(pid) == start
