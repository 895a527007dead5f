"""Loop of `mvd-scale supervise` on one host: it runs the ranks that the coordinator asks for, or coordinates itself."""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from mvd_scale.distributed.free_port import free_port
from mvd_scale.elastic.coordinator import Coordinator, Hooks, Membership
from mvd_scale.elastic.local_ranks import LocalRanks, Place
from mvd_scale.elastic.meeting import (
    AddressBook,
    JoinRefused,
    Site,
    find_coordinator,
    is_better,
    join_coordinator,
)
from mvd_scale.elastic.messages import Connection, Message
from mvd_scale.elastic.policy import STOP_SIGNALS, Limits, RestartBudget
from mvd_scale.elastic.server import BEAT_SECONDS, CoordinatorServer
from mvd_scale.errors import FAULT_CODE, UserError

logger = logging.getLogger("mvd_scale")

_POLL_SECONDS = 0.1
_SEARCH_SECONDS = 1.0
_GRACE_SECONDS = 30.0
"""Time of ranks to end after a failure of another one, before they are killed."""
_SAVE_SECONDS = 900.0
"""Time of ranks to finish their step and save a checkpoint before they are killed."""


@dataclass(frozen=True)
class SupervisedJob:
    """Command that is supervised, and how."""

    command: Sequence[str]
    """Words of the command of every rank."""
    digest: str
    """Digest of the command and the hosts, which must be the same on all hosts."""
    hooks: Hooks
    membership: Membership
    limits: Limits = field(default_factory=Limits)
    dead_seconds: float = 15.0
    """Seconds of silence after which a host counts as lost."""
    takeover_seconds: float = 5.0
    """Seconds that a host waits for each host before it in the hostfile until it coordinates itself."""
    master_port: int = 0
    """Port where ranks meet; 0 for any that is free."""


class Supervisor:
    """Supervisor of one host.

    Args:
        job: what is supervised.
        site: this host among all.
        slots: largest number of ranks of this host.
    """

    def __init__(self, job: SupervisedJob, site: Site, slots: int) -> None:
        self._job = job
        self._site = site
        self._slots = slots
        self._budget = RestartBudget(job.limits)
        self._attempt = 0
        self._ranks: LocalRanks | None = None
        self._connection: Connection | None = None
        self._server: CoordinatorServer | None = None
        self._beaten = 0.0
        self._signals: list[int] = []
        self._stopped: int | None = None
        self._exit_code: int | None = None
        self._rivals = _Rivals(site)
        self._book = AddressBook()
        self._refused = ""

    def run(self) -> int:
        """Run until the job is over; return its exit code.

        Raises:
            UserError: the port is in use, or another host refuses this one.
        """
        before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        try:
            while self._exit_code is None:
                self._step()
            return self._exit_code
        finally:
            if self._ranks is not None:
                self._ranks.kill()
            if self._server is not None:
                self._server.close(seconds=self._job.dead_seconds)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _step(self) -> None:
        """Take one turn: a signal, messages of the coordinator, the ranks, or the search for a coordinator."""
        self._forward_signals()
        if self._exit_code is not None:
            return
        if self._connection is not None:
            self._exchange(self._connection)
        elif self._ranks is None:
            self._meet()
        else:
            time.sleep(_POLL_SECONDS)
        self._watch_ranks()
        if self._server is not None and self._rivals.found(self._server):
            logger.warning("supervise: gives way to another coordinator")
            self._disconnect()

    def _forward_signals(self) -> None:
        while self._signals:
            self._stopped = self._signals.pop(0)
            if self._ranks is not None:
                self._ranks.stop(self._stopped, _SAVE_SECONDS)
            self._tell({"kind": "stop", "signal": self._stopped})
        if self._stopped is not None and self._connection is None and self._ranks is None:
            self._exit_code = 128 + self._stopped

    def _exchange(self, connection: Connection) -> None:
        """Read the messages of the coordinator, and send a sign of life."""
        select.select([connection], [], [], _POLL_SECONDS)
        try:
            for message in connection.receive():
                self._obey(message)
            if time.monotonic() - connection.heard > self._job.dead_seconds:
                raise ConnectionError("silent")
        except ConnectionError as error:
            if self._exit_code is None:
                logger.warning("supervise: the coordinator is gone (%s)", error)
                self._disconnect()
            return
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._beaten = time.monotonic()
            self._tell({"kind": "beat"} if self._ranks else {"kind": "beat", "port": self._free_port()})

    def _obey(self, message: Message) -> None:
        kind = message["kind"]
        self._attempt = max(self._attempt, message.get("attempt", 0))
        if "failures" in message:
            self._budget.take_over(message["failures"], time.monotonic())
        if kind == "start":
            self._start(Place(**{name: message[name] for name in Place.__dataclass_fields__}))
        elif kind == "stop" and self._ranks is not None:
            # A signal that this host itself received has been forwarded.
            number = message["signal"] if message["signal"] != self._stopped else None
            self._ranks.stop(number, _SAVE_SECONDS if message["saves"] else _GRACE_SECONDS)
        elif kind == "end":
            logger.info("supervise: ends with exit code %d: %s", message["code"], message["reason"])
            self._exit_code = int(message["code"])

    def _start(self, place: Place) -> None:
        try:
            self._ranks = LocalRanks(self._job.command, place, os.environ)
        except OSError as error:
            logger.error("supervise: ranks cannot be started: %s", error)
            self._tell_end([FAULT_CODE])
            return
        if self._stopped is not None:
            # The signal came while the message was under way; the stop that answers it passes no signal on.
            self._ranks.stop(self._stopped, _SAVE_SECONDS)

    def _watch_ranks(self) -> None:
        """Tell the coordinator about ranks that have ended."""
        if self._ranks is None:
            return
        ended = self._ranks.poll()
        failed = [code for code in ended if code]
        if failed:
            self._tell({"kind": "failed", "attempt": self._attempt, "codes": failed})
        if not self._ranks.is_running:
            codes, self._ranks = self._ranks.codes, None
            self._tell_end(codes)

    def _tell_end(self, codes: list[int]) -> None:
        self._tell({"kind": "ended", "attempt": self._attempt, "codes": codes, "port": self._free_port()})

    def _tell(self, message: Message) -> None:
        if self._connection is not None:
            # Where that fails, the next reading finds it out.
            with suppress(ConnectionError):
                self._connection.send(message)

    def _free_port(self) -> int:
        try:
            return self._job.master_port or free_port(host=self._site.address)
        except OSError:
            # An interface that is down may have lost its address, until it is up again.
            return free_port()

    def _meet(self) -> None:
        """Join the coordinator of another host, or coordinate where none of the hosts before this one does."""
        deadline = time.monotonic() + self._job.takeover_seconds * self._site.index
        while not self._signals:
            host = find_coordinator(self._site, self._site.others)
            if host is not None:
                self._connection = self._join(host)
                if self._connection is not None:
                    return
            elif time.monotonic() >= deadline and self._try_to_serve():
                return
            time.sleep(_SEARCH_SECONDS)

    def _join(self, host: str) -> Connection | None:
        try:
            return join_coordinator(self._site, host, self._hello())
        except JoinRefused as refusal:
            said = f"the supervisor of {host} refuses {self._site.name}: {refusal}"
            if refusal.final:
                raise UserError(said) from refusal
            if said != self._refused:
                logger.warning("supervise: %s; tries again", said)
            self._refused = said
            return None

    def _try_to_serve(self) -> bool:
        try:
            self._serve()
        except UserError as error:
            if not self._attempt:
                raise
            # A job that has run may do so again, once the interface has its address back.
            logger.warning("%s", error)
            return False
        return True

    def _serve(self) -> None:
        coordinator = Coordinator(self._job.membership, self._job.hooks, self._budget)
        self._server = CoordinatorServer(coordinator, self._site.listen(), self._refusal, self._job.dead_seconds)
        for host in self._site.others:
            self._book.look_up(host)
        self._server.start()
        self._connection = Connection(self._server.own_socket())
        self._tell(self._hello())

    def _hello(self) -> Message:
        return {
            "kind": "hello",
            "host": self._site.name,
            "job": self._job.digest,
            "slots": self._slots,
            "address": self._site.address,
            "port": self._free_port(),
            "attempt": self._attempt,
            "failures": self._budget.to_message(time.monotonic()),
        }

    def _refusal(self, host: str, address: str, digest: str) -> JoinRefused | None:
        """Reason why a host that connects from an address may not take part; None if it may.

        It waits for no name server: the thread of the coordinator, which sends the signs of life, calls it.
        """
        mine = self._site.name
        if host not in self._site.hosts:
            return JoinRefused(f"the hostfile of {mine} has no host {host}")
        if digest != self._job.digest:
            return JoinRefused(
                f"{mine} has another command or another hostfile: start the same on all hosts, or choose another "
                "`--port` for another job"
            )
        if address and address not in self._book.addresses(host):
            # Names of pods that start anew have new addresses, which are known later. The host asks again soon.
            return JoinRefused(f"{address} is no address of {host} as {mine} knows it", final=False)
        return None

    def _disconnect(self) -> None:
        """End the ranks and the connection, after which the loop looks for another coordinator."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._ranks is not None:
            self._ranks.stop(signal.SIGTERM, _GRACE_SECONDS)


class _Rivals:
    """Search for another coordinator while this host coordinates and waits for hosts, without holding up its loop."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._pool = ThreadPoolExecutor(1)
        self._search: Future[Any] | None = None
        self._next = 0.0

    def found(self, server: CoordinatorServer) -> bool:
        """Whether another coordinator takes precedence."""
        if self._search is not None and self._search.done():
            search, self._search = self._search, None
            return server.is_gathering and search.result() is not None
        missing = [host for host in self._site.hosts if host not in server.members]
        if self._search is None and missing and server.is_gathering and time.monotonic() >= self._next:
            self._next = time.monotonic() + _SEARCH_SECONDS
            self._search = self._pool.submit(self._first_better, missing)
        return False

    def _first_better(self, hosts: list[str]) -> str | None:
        host = find_coordinator(self._site, hosts)
        return host if host is not None and is_better(self._site, host) else None
