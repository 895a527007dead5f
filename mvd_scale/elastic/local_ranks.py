"""Processes of the ranks of this host."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_OTHER_LAUNCHERS = ("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
"""Variables of other launchers, one of which may have started the supervisor, that would contradict those of a rank."""


@dataclass(frozen=True)
class Place:
    """Place of the ranks of this host among all of an attempt."""

    ranks: int
    """Number of ranks of this host."""
    first_rank: int
    """Number of the first of them."""
    world_size: int
    node: int
    """Number of this host among those that have ranks."""
    address: str
    """Address at which all ranks meet."""
    port: int

    def environment(self, local_rank: int) -> dict[str, str]:
        """Environment variables of a rank, as other launchers set them."""
        values = {
            "RANK": self.first_rank + local_rank,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": self.ranks,
            "WORLD_SIZE": self.world_size,
            "GROUP_RANK": self.node,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in values.items()}


class LocalRanks:
    """Processes of the ranks of this host in one attempt, each in a session of its own.

    Args:
        command: words of the command of a rank.
        place: place of the ranks.
        environment: environment variables besides those of the place.

    Raises:
        OSError: a process cannot be started, as where memory is short; none of them is left.
    """

    def __init__(self, command: Sequence[str], place: Place, environment: Mapping[str, str]) -> None:
        kept = {name: value for name, value in environment.items() if name not in _OTHER_LAUNCHERS}
        self.codes: list[int] = []
        """Exit codes of the ranks that have ended; that of a rank that a signal ended is negative."""
        self._kill_at = float("inf")
        self._running: list[subprocess.Popen[bytes]] = []
        try:
            for local_rank in range(place.ranks):
                environment = kept | place.environment(local_rank)
                # A session of its own: Ctrl-C in the terminal reaches the supervisor alone, which forwards it.
                rank = subprocess.Popen(
                    list(command), env=environment, stdin=subprocess.DEVNULL, start_new_session=True
                )
                self._running.append(rank)
        except OSError:
            self.kill()
            raise

    @property
    def is_running(self) -> bool:
        """Whether a rank has not ended, as far as `poll` has seen."""
        return bool(self._running)

    def poll(self) -> list[int]:
        """Collect the ranks that have ended, and kill those whose time to end is over.

        Returns:
            Exit codes of those that have ended since the last call.
        """
        if time.monotonic() >= self._kill_at:
            self.kill()
        ended = [rank for rank in self._running if _has_ended(rank.pid)]
        for rank in ended:
            self._running.remove(rank)
            # Its data workers belong to its session. The number cannot be another's before `wait` has collected it.
            _signal_session(rank.pid, signal.SIGKILL)
        codes = [rank.wait() for rank in ended]
        self.codes += codes
        return codes

    def stop(self, number: int | None, seconds: float) -> None:
        """Send a signal to every rank, unless it is None; kill those that have not ended after so many seconds."""
        self._kill_at = min(self._kill_at, time.monotonic() + seconds)
        if number is not None:
            for rank in self._running:
                # Not by `Popen.send_signal`, which collects a rank that has just ended: then `poll` would find none.
                os.kill(rank.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to every rank and its children."""
        for rank in self._running:
            _signal_session(rank.pid, signal.SIGKILL)


def _has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal_session(leader: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, number)
