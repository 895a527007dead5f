"""Server of a coordinator: the first messages of a host, connections that break, and names that nobody answers."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mvd_scale.elastic import meeting, server
from mvd_scale.elastic.coordinator import Coordinator, Membership
from mvd_scale.elastic.meeting import JoinRefused, Site
from mvd_scale.elastic.messages import Connection
from mvd_scale.elastic.policy import Limits, RestartBudget
from mvd_scale.elastic.server import CoordinatorServer
from mvd_scale.elastic.supervisor import SupervisedJob, Supervisor
from tests.unit.elastic.test_supervisor import wait_until

HOSTS = ("node-1", "node-2")
HELLO = {"kind": "hello", "job": "toy", "slots": 2, "address": "10.0.0.1", "port": 1, "attempt": 0, "failures": []}

Refusal = Callable[[str, str, str], JoinRefused | None]


class Served:
    """Coordinator that waits for more hosts than come, and its server."""

    def __init__(self, refusal: Refusal) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        # No command: a coordinator that gathers hosts asks nothing of it.
        membership = Membership(HOSTS, min_hosts=3)
        coordinator = Coordinator(membership, None, RestartBudget(Limits()))  # type: ignore[arg-type]
        self.thread = CoordinatorServer(coordinator, listener, refusal, dead_seconds=20)
        self.thread.start()

    def connect(self, host: str) -> Peer:
        """Connect as the host of the coordinator, which is the first, or as another one."""
        own = host == HOSTS[0]
        return Peer(self.thread.own_socket() if own else socket.create_connection(self.address), host)


class Peer:
    """Connection of a host to the coordinator."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        sock.settimeout(20)
        self.sock = sock
        self.host = host
        self.lines = sock.makefile()

    def say(self, *messages: dict[str, Any]) -> None:
        """Send messages at once."""
        self.sock.sendall("".join(json.dumps(message) + "\n" for message in messages).encode())

    def join(self, **changed: Any) -> None:
        self.say(HELLO | {"host": self.host} | changed)

    def hear(self, kind: str) -> dict[str, Any]:
        """Wait for the next message of a kind."""
        for line in self.lines:
            message: dict[str, Any] = json.loads(line)
            if message["kind"] == kind:
                return message
        raise ConnectionError("closed by the coordinator")


@pytest.fixture
def serve() -> Iterator[Callable[[Refusal], Served]]:
    made: list[Served] = []

    def make(refusal: Refusal) -> Served:
        made.append(Served(refusal))
        return made[-1]

    yield make
    for served in made:
        served.thread.close()
        served.thread.own_socket().close()


def welcome_all(*_: str) -> None:
    return None


@pytest.mark.parametrize("host", HOSTS)
def test_a_stop_that_comes_with_the_first_message_is_heard(host: str, serve: Callable[[Refusal], Served]) -> None:
    peer = serve(welcome_all).connect(host)
    peer.say(HELLO | {"host": host}, {"kind": "stop", "signal": signal.SIGTERM})
    assert peer.hear("welcome")
    assert peer.hear("end")["code"] == 143


@pytest.mark.parametrize("changed", [{"attempt": "x"}, {"failures": [[1, 2, "no cause"]]}, {"slots": None}])
def test_a_host_that_joins_wrongly_is_left_out(changed: dict[str, Any], serve: Callable[[Refusal], Served]) -> None:
    served = serve(welcome_all)
    wrong = served.connect(HOSTS[1])
    wrong.join(**changed)
    with pytest.raises(ConnectionError):
        wrong.hear("end")
    right = served.connect(HOSTS[1])
    right.join()
    assert right.hear("welcome")
    wait_until(lambda: served.thread.members == [HOSTS[1]], "the second host")


def test_a_host_whose_first_stop_makes_no_sense_is_lost(serve: Callable[[Refusal], Served]) -> None:
    served = serve(welcome_all)
    wrong = served.connect(HOSTS[1])
    wrong.say(HELLO | {"host": HOSTS[1]}, {"kind": "stop", "signal": "x"})
    with pytest.raises(ConnectionError):
        wrong.hear("end")
    wait_until(lambda: served.thread.members == [], "the loss of the second host")
    assert served.thread.is_alive()


def test_a_connection_that_is_gone_before_its_address_is_read_ends_alone(
    serve: Callable[[Refusal], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Connection) -> str:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    served = serve(welcome_all)
    first = served.connect(HOSTS[1])
    with monkeypatch.context() as broken:
        broken.setattr(Connection, "peer", property(gone))
        first.join()
        with pytest.raises(ConnectionError):
            first.hear("welcome")
    again = served.connect(HOSTS[1])
    again.join()
    assert again.hear("welcome")


def test_a_name_server_that_does_not_answer_holds_up_no_sign_of_life(
    serve: Callable[[Refusal], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(meeting, "addresses_of", lambda host: ["127.0.0.1"] if answers.wait(20) else [])
    monkeypatch.setattr(server, "BEAT_SECONDS", 0.05)
    job = SupervisedJob(["unused"], "toy", None, Membership(HOSTS))  # type: ignore[arg-type]
    served = serve(Supervisor(job, Site(HOSTS, HOSTS[0], "127.0.0.1", 0), 2)._refusal)
    own = served.connect(HOSTS[0])
    own.join()
    other = served.connect(HOSTS[1])
    other.join()
    refused = other.hear("refused")
    assert refused["reason"] == "127.0.0.1 is no address of node-2 as node-1 knows it"
    assert not refused["final"], "it asks again"
    for _ in range(3):
        assert own.hear("beat")
    answers.set()

    def is_in() -> bool:
        other = served.connect(HOSTS[1])
        other.join()
        return bool(json.loads(other.lines.readline())["kind"] == "welcome")

    wait_until(is_in, "a welcome")
