"""The coordinator of a job behind a socket of its host: a thread that owns it and all connections to hosts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from mvd_scale.elastic.coordinator import Coordinator, Member, Phase
from mvd_scale.elastic.meeting import JoinRefused
from mvd_scale.elastic.messages import Connection, Message

_TICK_SECONDS = 0.05
"""Seconds from one look at all connections to the next. Waiting for the first of many to speak would cost more."""
BEAT_SECONDS = 1.0
"""Seconds from one sign of life of a host to the next."""
_HELLO_SECONDS = 5.0
"""Seconds after which a connection is closed that has not said whose it is."""


class CoordinatorServer(threading.Thread):
    """Thread that serves a coordinator until the job is over or `close` is called.

    Args:
        coordinator: state of the job, which belongs to the thread from now on.
        listener: listening socket for the other hosts; None for a job on one host, which then listens nowhere.
        refusal: function from a host's name, its address and the digest of its job to the reason why it is not taken
            in, or None.
        dead_seconds: seconds of silence after which a host counts as lost.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        listener: socket.socket | None,
        refusal: Callable[[str, str, str], JoinRefused | None],
        dead_seconds: float,
    ) -> None:
        super().__init__(name="coordinator", daemon=True)
        self.phase = coordinator.phase
        self.members = coordinator.members
        self._coordinator = coordinator
        self._listener = listener
        self._refusal = refusal
        self._dead_seconds = dead_seconds
        self._unknown: dict[Connection, float] = {}
        """Connections that have not said whose they are, and since when."""
        self._hosts: dict[str, Connection] = {}
        self._beaten = 0.0
        self._closed = threading.Event()
        own, self._own_end = socket.socketpair()
        self._add(own)
        if listener is not None:
            listener.setblocking(False)

    def own_socket(self) -> socket.socket:
        """Socket of this host itself, connected to the coordinator without the network."""
        return self._own_end

    def close(self, seconds: float = 0.0) -> None:
        """End the thread, which closes all connections; wait so long for messages that are not sent yet."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(host.has_unsent for host in [*self._hosts.values()]):
            time.sleep(_TICK_SECONDS)
        self._closed.set()
        self.join()

    def run(self) -> None:
        """Serve the coordinator."""
        while not self._closed.wait(_TICK_SECONDS):
            self._accept()
            now = time.monotonic()
            # In this order: a supervisor that ended before another was started on its host is gone first.
            for host, connection in [*self._hosts.items()]:
                self._listen(host, connection, now)
            for connection in [*self._unknown]:
                self._greet(connection, now)
            self._coordinator.tick(now)
            self._send(now)
            self.phase, self.members = self._coordinator.phase, self._coordinator.members
        for connection in [*self._unknown, *self._hosts.values()]:
            connection.close()
        if self._listener is not None:
            self._listener.close()

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._add(sock)

    def _add(self, sock: socket.socket) -> None:
        self._unknown[Connection(sock)] = time.monotonic()

    def _greet(self, connection: Connection, now: float) -> None:
        """Read the first message of a connection: a host joins, or asks what there is."""
        try:
            messages = connection.receive()
            if not messages:
                if now - self._unknown[connection] > _HELLO_SECONDS:
                    raise ConnectionError("silent")
                return
            del self._unknown[connection]
            first, *following = messages
            if first["kind"] == "hello":
                if self._admit(connection, first, now):
                    # A stop, for example, that was asked for while the host came.
                    for message in following:
                        self._hear(str(first["host"]), message, now)
            else:
                state = self._coordinator.phase.name
                connection.send({"kind": "coordinator", "phase": state})
                connection.close()
        except (OSError, KeyError, TypeError, ValueError):
            # Not a host of this job, or one that is gone already. A host that was admitted is lost at the next look.
            self._unknown.pop(connection, None)
            connection.close()

    def _admit(self, connection: Connection, hello: Message, now: float) -> bool:
        """Take a host in, or refuse it; return whether it is in."""
        host = str(hello["host"])
        refused = self._refusal(host, connection.peer, str(hello["job"]))
        # A host that lost its power leaves a connection behind, but a silent one.
        if refused is None and host in self._hosts and now - self._hosts[host].heard < 3 * BEAT_SECONDS:
            refused = JoinRefused(f"{host} has a supervisor of this job already")
        if refused is not None:
            connection.send({"kind": "refused", "reason": str(refused), "final": refused.final})
            connection.close()
            return False
        member = Member(int(hello["slots"]), str(hello["address"]), int(hello["port"]))
        failures = [(float(age), float(seconds), str(cause)) for age, seconds, cause in hello["failures"]]
        if host in self._hosts:
            self._lose(host, now)
        connection.send({"kind": "welcome"})
        self._coordinator.budget.take_over(failures, now)
        self._coordinator.join(host, member, int(hello["attempt"]), now)
        # Last: those that are here are members, and can leave.
        self._hosts[host] = connection
        return True

    def _listen(self, host: str, connection: Connection, now: float) -> None:
        try:
            for message in connection.receive():
                self._hear(host, message, now)
            if now - connection.heard > self._dead_seconds:
                raise ConnectionError("silent")
        except (OSError, KeyError, TypeError, ValueError):
            self._lose(host, now)

    def _hear(self, host: str, message: Message, now: float) -> None:
        kind = message["kind"]
        if kind == "failed":
            self._coordinator.failed(host, int(message["attempt"]), [int(code) for code in message["codes"]])
        elif kind == "ended":
            codes = [int(code) for code in message["codes"]]
            self._coordinator.ended(host, int(message["attempt"]), codes, int(message["port"]), now)
        elif kind == "beat" and "port" in message:
            self._coordinator.offer_port(host, int(message["port"]))
        elif kind == "stop":
            self._coordinator.request_stop(int(message["signal"]))

    def _lose(self, host: str, now: float) -> None:
        self._hosts.pop(host).close()
        self._coordinator.leave(host, now)

    def _send(self, now: float) -> None:
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self._coordinator.outbox += [(host, {"kind": "beat"}) for host in self._hosts]
        outbox, self._coordinator.outbox = self._coordinator.outbox, []
        for host, message in outbox:
            if host in self._hosts:
                try:
                    self._hosts[host].send(message)
                except ConnectionError:
                    self._lose(host, now)
        for host, connection in [*self._hosts.items()]:
            try:
                connection.flush()
            except ConnectionError:
                self._lose(host, now)

    @property
    def is_gathering(self) -> bool:
        """Whether ranks of no host run, and the job is not over."""
        return self.phase is Phase.GATHERING
