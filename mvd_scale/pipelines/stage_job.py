"""Process of a stage: a command in a session of its own, which ends when the process of the pipeline ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import BinaryIO

_MAX_WAIT_SECONDS = 120
"""Seconds that a start waits for the ranks of a stage that was stopped, which save a checkpoint before they end."""


class StageJob:
    """Running command of a stage.

    Args:
        command: the command.
        env: its environment.
        lock: file descriptor of the lock of the pipeline's folder. The job inherits it, so that a new start waits until
            the last rank of a killed start has ended.
        cpus: CPUs that the command may use; those of this process if None.
        output: file for what the command prints; where this process prints, if None.
    """

    cpu_seconds = 0.0
    """Time on CPUs of the command and of all its processes, once it has ended."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        lock: int,
        cpus: Collection[int] | None = None,
        output: BinaryIO | None = None,
    ) -> None:
        # `_held` is the write end of the pipe by which the guard notices that this process ended.
        alive, self._held = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mvd_scale.distributed.process_guard", str(alive), *command],
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(alive, lock),
            preexec_fn=None if cpus is None else partial(os.sched_setaffinity, 0, cpus),
        )
        os.close(alive)

    def poll(self) -> int | None:
        """Exit code of the command; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Wait until the command has ended, and return its exit code."""
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, options: int) -> int | None:
        if self._process.returncode is None:
            pid, status, used = os.wait4(self._process.pid, options)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = used.ru_utime + used.ru_stime
        code: int | None = self._process.returncode
        return code

    def end(self) -> None:
        """Stop the command if it runs, and wait until its processes, which may save a checkpoint, have ended."""
        os.close(self._held)
        self.wait()
        for _ in range(10 * _MAX_WAIT_SECONDS):
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
