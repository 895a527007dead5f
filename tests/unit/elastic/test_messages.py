"""Lines of JSON between hosts, from hosts that are slow, gone or strangers."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from mvd_scale.elastic.messages import MAX_BYTES, Connection


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket]]:
    mine, theirs = socket.socketpair()
    connection = Connection(mine)
    yield connection, theirs
    connection.close()
    theirs.close()


def test_messages_arrive_whole_however_they_are_cut(ends: tuple[Connection, socket.socket]) -> None:
    connection, other = ends
    assert connection.receive() == []
    other.sendall(b'{"kind": "be')
    assert connection.receive() == []
    other.sendall(b'at"}\n{"kind": "stop", "signal": 15}\n{"kind"')
    assert connection.receive() == [{"kind": "beat"}, {"kind": "stop", "signal": 15}]


def test_what_the_other_host_does_not_take_waits(ends: tuple[Connection, socket.socket]) -> None:
    connection, other = ends
    message = {"kind": "start", "text": "x" * 1000}
    while not connection.has_unsent:
        connection.send(message)
    while connection.has_unsent:
        other.recv(1 << 20)
        connection.flush()


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\n", b"[1]\n", b'{"kind": 3}\n', b"\xff\n", b"\x80\x04\x95.\n", b"x" * (MAX_BYTES + 1)]
)
def test_strangers_are_hung_up_on(ends: tuple[Connection, socket.socket], sent: bytes) -> None:
    connection, other = ends
    other.sendall(sent)
    if len(sent) > MAX_BYTES:
        assert connection.receive() == []
    with pytest.raises(ConnectionError, match="no message of a supervised job"):
        connection.receive()


def test_a_host_that_is_gone_is_noticed(ends: tuple[Connection, socket.socket]) -> None:
    connection, other = ends
    other.close()
    with pytest.raises(ConnectionError):
        connection.receive()
    with pytest.raises(ConnectionError):
        connection.send({"kind": "beat"})
