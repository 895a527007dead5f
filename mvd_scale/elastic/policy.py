"""Decisions of a supervised job: what an exit code means, how often and when to restart, and on how many ranks."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from mvd_scale.errors import FAULT_CODE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals at which a run saves a checkpoint and ends with exit code 128 + the number of the signal."""

INVALID_CODE = 2
"""Exit code after a `UserError`, which no restart mends."""


class Cause(StrEnum):
    """Cause of the end of the ranks of an attempt."""

    FINISHED = "finished"
    INVALID = "invalid input"
    STOPPED = "stop request"
    ERROR = "error"
    """Exit code 1, a traceback: hardly anything that a restart mends, but it may."""
    FAULT = "fault"
    """A `RunFault`, or a process that a signal has ended, as the kernel does where memory is short."""
    HOST_LOST = "host lost"
    HOST_JOINED = "host joined"


def cause_of(code: int) -> Cause:
    """Cause that the exit code of a rank tells; negative numbers are those of the signals that ended it.

    A stop signal ends a rank that has not begun to train, because there is nothing to save.
    """
    if code == 0:
        return Cause.FINISHED
    if code == INVALID_CODE:
        return Cause.INVALID
    if code - 128 in STOP_SIGNALS or -code in STOP_SIGNALS:
        return Cause.STOPPED
    return Cause.FAULT if code == FAULT_CODE or code < 0 else Cause.ERROR


_FIRST = (Cause.FAULT, Cause.ERROR, Cause.INVALID, Cause.STOPPED, Cause.FINISHED)


def first_cause(codes: Iterable[int]) -> tuple[Cause, int]:
    """Cause and exit code of ranks that have ended at the same time, as far as can be observed.

    A fault comes before invalid input: its message may be about the rank that has failed, as where ranks do not find
    the first one any more. Invalid input that is none ends the job at the next attempt.
    """
    return min(((cause_of(code), code) for code in codes), key=lambda found: _FIRST.index(found[0]))


@dataclass(frozen=True)
class Limits:
    """Limits of the restarts after failures; a restart because a host joined does not count."""

    restarts: int = 10
    """Largest number of restarts within a period."""
    errors: int = 2
    """Largest number of them after a traceback (exit code 1)."""
    period: float = 24 * 3600.0
    """Seconds of a period."""
    backoff: float = 5.0
    """Seconds before the first restart; each further one waits twice as long."""
    longest_backoff: float = 300.0
    """Longest wait in seconds. An attempt that ran longer than this starts the waits anew."""


@dataclass
class Failure:
    """An attempt that failed."""

    time: float
    """Time of its end in seconds, by the monotonic clock of this host."""
    seconds: float
    """Seconds that it ran."""
    cause: Cause


@dataclass
class RestartBudget:
    """Record of failures, from which follow whether the job may restart and how long it waits before."""

    limits: Limits
    failures: list[Failure] = field(default_factory=list)

    def record(self, failure: Failure) -> str | None:
        """Add a failure; return the limit that it exceeds, in words, or None if the job may restart."""
        since = failure.time - self.limits.period
        self.failures = [*(earlier for earlier in self.failures if earlier.time >= since), failure]
        hours = f"{self.limits.period / 3600:g} h"
        if len(self.failures) > self.limits.restarts:
            return f"{len(self.failures)} failures in {hours}, of which {self.limits.restarts} may be restarted"
        errors = sum(known.cause is Cause.ERROR for known in self.failures)
        if failure.cause is Cause.ERROR and errors > self.limits.errors:
            return f"{errors} errors with a traceback in {hours}, of which {self.limits.errors} may be restarted"
        return None

    def delay(self) -> float:
        """Seconds to wait before the next attempt."""
        quick = 0
        for failure in reversed(self.failures):
            quick += 1
            if failure.seconds > self.limits.longest_backoff:
                break
        return min(self.limits.backoff * 2.0 ** max(quick - 1, 0), self.limits.longest_backoff) if quick else 0.0

    def to_message(self, now: float) -> list[list[float | str]]:
        """Failures for another host, whose clock differs: their ages in place of their times."""
        return [[now - failure.time, failure.seconds, str(failure.cause)] for failure in self.failures]

    def take_over(self, message: Iterable[tuple[float, float, str]], now: float) -> None:
        """Take over the failures that another coordinator has recorded, if those are more."""
        told = [Failure(now - age, seconds, Cause(cause)) for age, seconds, cause in message]
        if len(told) > len(self.failures):
            self.failures = told


def plan_ranks(slots: Mapping[str, int], allowed: Callable[[int], bool]) -> dict[str, int]:
    """Number of ranks of each host: in total the largest allowed number, the first hosts filled first.

    Args:
        slots: largest number of ranks of each host, in the order of the hosts.
        allowed: whether the global batch can be split over a number of ranks.

    Returns:
        Hosts with at least one rank, in the same order; the others are spares. Empty if no number is allowed.
    """
    left = next((total for total in range(sum(slots.values()), 0, -1) if allowed(total)), 0)
    planned: dict[str, int] = {}
    for host, most in slots.items():
        if count := min(most, left):
            planned[host] = count
            left -= count
    return planned
