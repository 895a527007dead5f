"""A free TCP port for ranks to meet at: `python -m mvd_scale.distributed.free_port [PORT]`.

The command prints a free port, or checks that PORT can be used and prints it.
"""

from __future__ import annotations

import socket
import sys


def free_port(wanted: int = 0, host: str = "") -> int:
    """Check that a port can be used, or choose one.

    Args:
        wanted: the port; 0 chooses a free one.
        host: address to bind; all addresses of this machine if empty.

    Raises:
        OSError: the port is in use, or needs rights that this process lacks.
    """
    with socket.socket() as probe:
        # The ranks' own meeting point binds with the same option: a port whose last connections still close is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, wanted))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Print the port, or end with a message and exit code 1."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else "0"
    if not wanted.isdecimal() or int(wanted) > 65535:
        sys.exit(f"error: MASTER_PORT is {wanted!r}, expected a number up to 65535")
    try:
        print(free_port(int(wanted)))
    except OSError as error:
        sys.exit(f"error: port {wanted} cannot be used ({error.strerror}): choose another MASTER_PORT")


if __name__ == "__main__":
    main()
