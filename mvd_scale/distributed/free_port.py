"""Choice of a free TCP port for the rendezvous of ranks: `python -m mvd_scale.distributed.free_port [PORT]`.

The command prints a free port, or checks that PORT can be used and prints it.
"""

from __future__ import annotations

import errno
import random
import socket
import sys
from contextlib import suppress

_ATTEMPTS = 100


def free_port(wanted: int = 0, host: str = "") -> int:
    """Check that a port can be used, or choose one.

    Args:
        wanted: number of the port; 0 chooses a free one.
        host: address to bind; all addresses of this machine if empty.

    Returns:
        Number of the port. A chosen port lies below those that the kernel gives to outgoing connections (from 32768 on
        Linux), because one of these could be taken by another process before the ranks meet.

    Raises:
        OSError: the port is in use, or this process lacks the rights to bind it.
    """
    if wanted:
        _bind(host, wanted)
        return wanted
    draw = random.SystemRandom()
    for _ in range(_ATTEMPTS):
        port = draw.randrange(10_000, 32_768)
        with suppress(OSError):
            _bind(host, port)
            return port
    raise OSError(errno.EADDRINUSE, f"none of {_ATTEMPTS} random ports is free")


def _bind(host: str, port: int) -> None:
    with socket.socket() as probe:
        # The ranks' own meeting point sets this option too: a port whose last connections still close counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def main() -> None:
    """Print the port, or exit with an error message and code 1."""
    port = sys.argv[1] if len(sys.argv) > 1 else "0"
    if not port.isdecimal() or int(port) > 65535:
        sys.exit(f"error: MASTER_PORT is {port!r}, expected a number up to 65535")
    try:
        print(free_port(int(port)))
    except OSError as error:
        sys.exit(f"error: port {port} cannot be used ({error.strerror}): choose another MASTER_PORT")


if __name__ == "__main__":
    main()
