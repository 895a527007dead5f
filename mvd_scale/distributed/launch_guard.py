"""Run a launcher of ranks, pass signals to its ranks, and end when every process of the job has ended.

    python launch_guard.py COMMAND...

The `deepspeed` command does not forward signals: ranks would train on after its end. A signal to all its processes is
no better: it ends helpers of the ranks, without which no step is finished. The exit code is that of the launcher,
or of a rank that outlived it, and 128 + N after signal N: `deepspeed` returns 0 when a signal ended its inner part.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

SECONDS_TO_SAVE = 600
"""Time of the ranks to save a checkpoint after the launcher has ended."""

SECONDS_TO_LOOK = 1
"""Time from one look for ranks to the next."""

_PR_SET_CHILD_SUBREAPER = 36


class LaunchGuard:
    """Parent of a launcher, and of its ranks as soon as that has ended.

    Args:
        command: command of the launcher.
    """

    def __init__(self, command: list[str]) -> None:
        # Processes whose parent ends become children of this one, which can wait for them then.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in SIGNALS:
            signal.signal(number, self._pass_on)
        # In a session of its own, so that Ctrl-C at a terminal reaches the ranks once, from here.
        self.launcher = subprocess.Popen(command, start_new_session=True)
        self._ranks: set[int] = set()
        self._look_for_ranks(signal.SIGALRM, None)

    def wait(self) -> int:
        """Wait until all processes have ended, and return the exit code of the job."""
        first = 0
        for process, code in self._ended():
            if process == self.launcher.pid or process in self._ranks:
                first = first or code
            if process == self.launcher.pid:
                # Ranks that are left have nobody else to end them.
                left = set(find_ranks(os.getpid()))
                self._ranks |= left
                _send(left, signal.SIGTERM)
                signal.signal(signal.SIGALRM, self._kill_all)
                signal.alarm(SECONDS_TO_SAVE)
        return exit_code(first)

    def _look_for_ranks(self, number: int, frame: FrameType | None) -> None:
        """Note the ranks, again and again until all are there: one that has ended cannot be told from a helper."""
        found = set(find_ranks(os.getpid()))
        complete = bool(found) and found == self._ranks
        self._ranks |= found
        if not complete:
            signal.signal(signal.SIGALRM, self._look_for_ranks)
            signal.alarm(SECONDS_TO_LOOK)

    def _ended(self) -> Iterator[tuple[int, int]]:
        """Processes as they end, with their exit codes; minus the signal that ended one."""
        while True:
            try:
                process, status = os.wait()
            except ChildProcessError:
                return
            yield process, os.waitstatus_to_exitcode(status)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if ranks := list(find_ranks(os.getpid())):
            _send(ranks, number)
        else:
            # The launcher has not started them yet, or they are on other hosts.
            with suppress(ProcessLookupError):
                os.killpg(self.launcher.pid, number if number == signal.SIGINT else signal.SIGTERM)

    def _kill_all(self, number: int, frame: FrameType | None) -> None:
        _send(_descendants(os.getpid(), _children_by_parent()), signal.SIGKILL)
        signal.alarm(1)


def exit_code(code: int) -> int:
    """Exit code that a shell reports.

    Args:
        code: exit code of a process, minus the signal that ended it; DeepSpeed passes such a number on modulo 256.
    """
    number = -code if code < 0 else 256 - code
    return 128 + number if 1 < number < 64 else code


def _send(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def find_ranks(process: int) -> Iterator[int]:
    """Descendants of a process that a launcher has given a rank; not those that inherited it from a rank."""
    children = _children_by_parent()
    level = [process]
    while level:
        found = [child for parent in level for child in children.get(parent, [])]
        ranks = {child for child in found if _has_rank(child)}
        yield from ranks
        level = [child for child in found if child not in ranks]


def _descendants(process: int, children: dict[int, list[int]]) -> Iterator[int]:
    for child in children.get(process, []):
        yield child
        yield from _descendants(child, children)


def _children_by_parent() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                # The name of the program, in brackets, may hold spaces and brackets.
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    return children


def _has_rank(process: int) -> bool:
    with suppress(OSError):
        return any(line.startswith(b"RANK=") for line in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
    return False


if __name__ == "__main__":
    sys.exit(LaunchGuard(sys.argv[1:]).wait())
