"""Coordinator of a supervised job: which hosts run ranks, from when to when, and what follows when they end.

It has no sockets, no processes and no clock: `server` tells it what happens and when, and sends its messages.

Messages to a host: `start` (run ranks), `spare` (others run), `stop` (end ranks by a signal), `end` (the job is over,
with this exit code). Messages from a host: `failed` (a rank has ended with a failure), `ended` (all ranks have ended),
`stop` (somebody asked the job to stop by a signal). `server` adds those by which hosts meet, and signs of life.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from mvd_scale.elastic.messages import Message
from mvd_scale.elastic.policy import INVALID_CODE, Cause, Failure, RestartBudget, first_cause, plan_ranks
from mvd_scale.errors import FAULT_CODE

logger = logging.getLogger("mvd_scale")

_FOLDER_SECONDS = 2.0
"""Seconds from one look at a run folder that is in use to the next."""


class Phase(Enum):
    """State of a job."""

    GATHERING = auto()
    """Ranks of no host run; the coordinator waits for hosts, or for the end of a back-off."""
    RUNNING = auto()
    STOPPING = auto()
    """Ranks of at least one host still end."""
    OVER = auto()


@dataclass(frozen=True)
class Membership:
    """Hosts that a job needs."""

    hosts: tuple[str, ...]
    """All hosts, in the order in which they get ranks."""
    min_hosts: int = 1
    """Smallest number of hosts that run without the others."""
    join_seconds: float = 60.0
    """Seconds that the present hosts wait for the others, before a start and when one has come later."""
    wait_seconds: float = 3600.0
    """Seconds after which the job ends because fewer than `min_hosts` are there."""


@dataclass
class Member:
    """Host that is connected."""

    slots: int
    """Largest number of its ranks."""
    address: str
    """Own address, at which its ranks can meet those of other hosts."""
    port: int
    """Port that was free when the host was last without ranks."""


@dataclass
class Attempt:
    """Ranks from their start to the end of the last one."""

    number: int
    ranks: dict[str, int]
    """Number of ranks of each host that has any."""
    started: float
    running: set[str]
    """Hosts whose ranks have not all ended."""
    codes: list[int] = field(default_factory=list)
    first: tuple[Cause, int] | None = None
    """First failure that a host reported."""
    lost: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    """Hosts for which the attempt was stopped, because more ranks can run with them."""

    @property
    def world_size(self) -> int:
        """Number of ranks of all hosts."""
        return sum(self.ranks.values())


class Hooks(Protocol):
    """Properties of the supervised command that a coordinator must know."""

    def allows(self, ranks: int) -> bool:
        """Whether the global batch can be split over a number of ranks."""

    def folder_holder(self) -> str | None:
        """Description of who trains in the run folder; None if it is free."""

    def record_restart(self, reason: str, ranks: dict[str, int], attempt: int) -> None:
        """Record a restart in the run folder.

        Args:
            reason: reason in words.
            ranks: number of ranks of each host that has any.
            attempt: number of the attempt, from 1.
        """


class Coordinator:
    """State of a job. `now` is the time in seconds by one monotonic clock.

    Args:
        membership: hosts that the job needs.
        hooks: what the coordinator must know of the command.
        budget: failures so far, and limits of restarts.
    """

    def __init__(self, membership: Membership, hooks: Hooks, budget: RestartBudget) -> None:
        self.membership = membership
        self.budget = budget
        self.phase = Phase.GATHERING
        self.outbox: list[tuple[str, Message]] = []
        """Messages to hosts, which the caller sends and removes."""
        self.exit_code: int | None = None
        self.number = 0
        """Number of the latest attempt of the job, under this coordinator or an earlier one."""
        self._hooks = hooks
        self._members: dict[str, Member] = {}
        self._attempt: Attempt | None = None
        self._gathering_since: float | None = None
        self._not_before = 0.0
        self._joined_at: float | None = None
        self._reason = ""
        self._stop_signal: int | None = None
        self._holder: str | None = None

    @property
    def members(self) -> list[str]:
        """Hosts that are connected, in the order of all hosts."""
        return [host for host in self.membership.hosts if host in self._members]

    def join(self, host: str, member: Member, number: int, now: float) -> None:
        """Take up a host.

        Args:
            host: its name.
            member: its properties.
            number: number of the latest attempt that it knows of.
            now: time.
        """
        self._members[host] = member
        self.number = max(self.number, number)
        self._joined_at = now
        if self._gathering_since is None:
            self._gathering_since = now
        logger.info("supervise: %s is here, %d of %d hosts", host, len(self._members), len(self.membership.hosts))
        if self.phase is Phase.OVER:
            self._send(host, "end", code=self.exit_code, reason="ended before this host came")

    def leave(self, host: str, now: float) -> None:
        """Note that a host is gone: its supervisor has ended, or does not answer."""
        self._members.pop(host)
        logger.warning("supervise: %s is gone; hosts left: %d", host, len(self._members))
        attempt = self._attempt
        if attempt is not None and host in attempt.running:
            attempt.running.discard(host)
            attempt.lost.append(host)
            self._stop(signal.SIGTERM, saves=False)
            self._conclude(now)

    def failed(self, host: str, number: int, codes: list[int]) -> None:
        """Note that ranks of a host have ended with these exit codes, other ones maybe not yet."""
        attempt = self._attempt
        if attempt is not None and number == attempt.number and host in attempt.running:
            self._note_failure(attempt, codes)

    def ended(self, host: str, number: int, codes: list[int], port: int, now: float) -> None:
        """Note that all ranks of a host have ended, with these exit codes; `port` is free now."""
        self.offer_port(host, port)
        attempt = self._attempt
        if attempt is not None and number == attempt.number and host in attempt.running:
            attempt.running.discard(host)
            attempt.codes += codes
            if failed := [code for code in codes if code]:
                self._note_failure(attempt, failed)
            self._conclude(now)

    def _note_failure(self, attempt: Attempt, codes: list[int]) -> None:
        attempt.first = attempt.first or first_cause(codes)
        if self.phase is Phase.RUNNING:
            self._stop(signal.SIGTERM, saves=attempt.first[0] is Cause.STOPPED)

    def offer_port(self, host: str, port: int) -> None:
        """Note a port of a host that is free now."""
        self._members[host].port = port

    def request_stop(self, number: int) -> None:
        """Stop the job for good, by a signal that one of its hosts received."""
        if self.phase is Phase.OVER:
            return
        if self._stop_signal is None:
            logger.info("supervise: stops on request, by %s", signal.Signals(number).name)
        self._stop_signal = number
        if self._attempt is None:
            self._finish(128 + number, "stopped before a start")
        else:
            self._stop(number, saves=True)

    def tick(self, now: float) -> None:
        """Start or stop ranks if it is time to."""
        if self.phase is Phase.GATHERING:
            self._start_if_ready(now)
        elif self.phase is Phase.RUNNING:
            self._make_room(now)

    def _start_if_ready(self, now: float) -> None:
        if self._gathering_since is None:
            return
        wanted, waited = self.membership, now - self._gathering_since
        enough = len(self._members) >= wanted.min_hosts
        if waited > wanted.wait_seconds and not (enough and plan_ranks(self._slots(), self._hooks.allows)):
            minutes = f"after {waited / 60:.0f} min"
            self._finish(FAULT_CODE, f"{len(self._members)} of at least {wanted.min_hosts} hosts are here {minutes}")
        elif enough and now >= self._not_before and not (self._is_incomplete and waited < wanted.join_seconds):
            self._start_or_wait_for_folder(now)

    @property
    def _is_incomplete(self) -> bool:
        return len(self._members) < len(self.membership.hosts)

    def _start_or_wait_for_folder(self, now: float) -> None:
        ranks = plan_ranks(self._slots(), self._hooks.allows)
        # Ranks of an earlier attempt, or of hosts behind a cut link, may still be in the run folder. The first start
        # of all hosts goes ahead: if others train there, it is the ranks that refuse, as without a supervisor.
        if (self.number or self._is_incomplete) and (holder := self._hooks.folder_holder()):
            if holder != self._holder:
                logger.info("supervise: waits for the run folder: %s", holder)
            self._holder = holder
            self._not_before = now + _FOLDER_SECONDS
        elif ranks:
            self._start(ranks, now)
        elif not self._is_incomplete:
            total = sum(self._slots().values())
            self._finish(INVALID_CODE, f"the global batch cannot be split over any number of ranks up to {total}")

    def _slots(self) -> dict[str, int]:
        return {host: self._members[host].slots for host in self.members}

    def _start(self, ranks: dict[str, int], now: float) -> None:
        self.number += 1
        self.phase = Phase.RUNNING
        self._attempt = attempt = Attempt(self.number, ranks, now, set(ranks))
        master = self._members[next(iter(ranks))]
        # Whichever host coordinates next must know of the failures.
        known = {"failures": self.budget.to_message(now)}
        first = 0
        for node, (host, count) in enumerate(ranks.items()):
            place = {"ranks": count, "first_rank": first, "world_size": attempt.world_size, "node": node}
            self._send(host, "start", address=master.address, port=master.port, **place, **known)
            first += count
        for host in self._members.keys() - ranks.keys():
            self._send(host, "spare", **known)
        shares = ", ".join(f"{host} {count}" for host, count in ranks.items())
        logger.info("supervise: attempt %d; ranks by host: %s", self.number, shares)
        if self.number > 1:
            self._hooks.record_restart(self._reason or "the coordinating host was lost", ranks, self.number)

    def _make_room(self, now: float) -> None:
        """Stop the attempt if more ranks can run with the hosts that have come since, and all had time to come."""
        attempt = self._attempt
        if attempt is None or self._joined_at is None or now - self._joined_at < self.membership.join_seconds:
            return
        self._joined_at = None
        planned = plan_ranks(self._slots(), self._hooks.allows)
        if sum(planned.values()) > attempt.world_size:
            attempt.joined = [host for host in planned if host not in attempt.ranks] or list(planned)
            self._stop(signal.SIGTERM, saves=True)

    def _stop(self, number: int, *, saves: bool) -> None:
        attempt = self._attempt
        self.phase = Phase.STOPPING
        for host in attempt.running if attempt else ():
            self._send(host, "stop", signal=number, saves=saves)

    def _conclude(self, now: float) -> None:
        """Decide what follows once the ranks of all hosts have ended."""
        attempt = self._attempt
        if attempt is None or attempt.running:
            return
        self._attempt = None
        cause, code = attempt.first or (Cause.FINISHED, 0)
        if not attempt.lost and not any(attempt.codes):
            self._finish(0, "finished")
        elif self._stop_signal is not None:
            saved = cause in (Cause.STOPPED, Cause.FINISHED)
            self._finish(128 + self._stop_signal if saved else _positive(code), "stopped on request")
        elif attempt.lost:
            self._restart(attempt, Cause.HOST_LOST, f"lost {', '.join(attempt.lost)}", now)
        elif attempt.joined and cause is Cause.STOPPED:
            # Those who wait for hosts have done so already.
            since = now - self.membership.join_seconds
            self._gather(f"{Cause.HOST_JOINED}: {', '.join(attempt.joined)}", since, now)
        elif cause is Cause.INVALID and self._is_incomplete and (holder := self._hooks.folder_holder()):
            # Ranks of the missing hosts may have taken the folder first, behind a cut link: this was their refusal.
            self._gather(holder, now, now + _FOLDER_SECONDS)
        elif cause in (Cause.INVALID, Cause.STOPPED):
            self._finish(_positive(code), f"{cause}, which no restart changes")
        else:
            self._restart(attempt, cause, f"{cause}, exit code {code}", now)

    def _restart(self, attempt: Attempt, cause: Cause, reason: str, now: float) -> None:
        exceeded = self.budget.record(Failure(now, now - attempt.started, cause))
        if exceeded:
            # A scheduler may try elsewhere what hosts or links have broken; a traceback comes back there as well.
            self._finish(1 if cause is Cause.ERROR else FAULT_CODE, f"{reason}; {exceeded}")
        else:
            self._gather(reason, now, now + self.budget.delay())

    def _gather(self, reason: str, since: float, not_before: float) -> None:
        self.phase = Phase.GATHERING
        self._reason = reason
        self._gathering_since, self._not_before = since, not_before
        logger.warning("supervise: %s; restarts as soon as it can", reason)

    def _finish(self, code: int, reason: str) -> None:
        self.phase = Phase.OVER
        self.exit_code = code
        for host in self._members:
            self._send(host, "end", code=code, reason=reason)

    def _send(self, host: str, kind: str, **fields: object) -> None:
        self.outbox.append((host, {"kind": kind, "attempt": self.number, **fields}))


def _positive(code: int) -> int:
    """Exit code that a shell reports for this one: 128 + the number of the signal that ended the process."""
    return 128 - code if code < 0 else code
