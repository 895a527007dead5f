"""Messages between the hosts of a supervised job: lines of JSON over a socket."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

MAX_BYTES = 64 * 1024
"""Longest line; a host that sends a longer one is no host of this job."""

Message = dict[str, Any]


class Connection:
    """Connection to another host that neither waits to send nor to receive.

    Args:
        sock: connected socket, which the connection owns from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._received = b""
        self._unsent = b""
        self.heard = time.monotonic()
        """Time at which the last message arrived, by the monotonic clock of this host."""

    def fileno(self) -> int:
        """File descriptor, for selectors."""
        return self._socket.fileno()

    @property
    def peer(self) -> str:
        """Address of the other host; empty within this one."""
        name = self._socket.getpeername()
        return str(name[0]) if isinstance(name, tuple) else ""

    @property
    def has_unsent(self) -> bool:
        """Whether messages wait to be sent."""
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Send a message, or keep it for `flush`.

        Raises:
            ConnectionError: the other host is gone.
        """
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the network takes it; exceptions as `send`."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            raise ConnectionError(error.strerror) from error

    def receive(self) -> list[Message]:
        """Return the messages that have arrived.

        Raises:
            ConnectionError: the other host is gone, or sends what is no message.
        """
        with suppress(BlockingIOError):
            try:
                chunk = self._socket.recv(MAX_BYTES)
            except BlockingIOError:
                raise
            except OSError as error:
                raise ConnectionError(error.strerror) from error
            if not chunk:
                raise ConnectionError("closed by the other host")
            self._received += chunk
        *lines, self._received = self._received.split(b"\n")
        if len(self._received) > MAX_BYTES:
            raise ConnectionError("no message of a supervised job")
        if lines:
            self.heard = time.monotonic()
        return [_parse(line) for line in lines]

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _parse(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ConnectionError("no message of a supervised job") from error
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ConnectionError("no message of a supervised job")
    return message
