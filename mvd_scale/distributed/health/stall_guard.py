"""Guard process of a rank that is stopped, or whose interpreter stands still, and so cannot end itself.

    python stall_guard.py FD PID SECONDS

The threads of the watchdog run in the rank: they stop with it (SIGSTOP, a frozen container), and wait while C code
holds the interpreter's lock. Then other ranks end the run, but this one would stay, with its device and its launcher.
The rank writes to the pipe FD again and again; after SECONDS of silence the guard lets it write its stacks and
continue, whereupon its own watchdog ends it, and kills it if it does not speak after that either.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import Self

SECONDS_TO_SPEAK = 10.0
"""Time in which a rank that was continued must speak."""


class StallGuard:
    """Context manager that guards this process.

    Args:
        seconds: silence after which the process is taken to be stopped.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Self:
        theirs, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        # Without site-packages the guard starts in 20 ms and takes 9 MB.
        command = [sys.executable, "-I", "-S", __file__, str(theirs), str(os.getpid()), str(self.seconds)]
        self._process = subprocess.Popen(command, pass_fds=[theirs], stdin=subprocess.DEVNULL)
        os.close(theirs)
        return self

    def beat(self) -> None:
        """Tell the guard that this process runs."""
        # A guard that was killed, or has not read for long, must not end the run.
        with suppress(BrokenPipeError, BlockingIOError):
            os.write(self._pipe, b".")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._pipe)
        # Workers that were forked may hold the pipe too.
        self._process.kill()
        self._process.wait()


def guard(pipe: int, process: int, seconds: float) -> None:
    """Guard a process until it ends, or closes the pipe.

    Args:
        pipe: file descriptor that the process writes to.
        process: number of the process.
        seconds: silence after which it is taken to be stopped.
    """
    try:
        ended = os.pidfd_open(process)
    except ProcessLookupError:
        return
    warned = False
    while True:
        ready, _, _ = select.select([pipe, ended], [], [], SECONDS_TO_SPEAK if warned else seconds)
        if ended in ready or (ready and not os.read(pipe, 1 << 16)):
            return
        if ready:
            warned = False
        elif warned:
            os.kill(process, signal.SIGKILL)
        else:
            # The handler of the stacks is C code, which needs no lock of the interpreter.
            os.kill(process, signal.SIGUSR2)
            os.kill(process, signal.SIGCONT)
            warned = True


if __name__ == "__main__":
    # Launchers send these to all processes of a job: the guard ends with its rank.
    for _signal in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(_signal, signal.SIG_IGN)
    guard(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
