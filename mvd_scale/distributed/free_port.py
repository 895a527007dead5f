"""Choice of a free TCP port for the rendezvous of ranks: `python -m mvd_scale.distributed.free_port [PORT]`.

The command prints a free port, or checks that PORT can be used and prints it.
"""

from __future__ import annotations

import socket
import sys


def free_port(port: int = 0, host: str = "") -> int:
    """Check that a port can be used, or choose one.

    Args:
        port: port to check; 0 chooses a free one.
        host: address to bind; all addresses of this machine if empty.

    Returns:
        the checked or chosen port.

    Raises:
        OSError: the port is in use, or needs rights that this process lacks.
    """
    with socket.socket() as probe:
        # torch's rendezvous server sets the same option: it can bind a port whose last connections are still closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        bound: int = probe.getsockname()[1]
        return bound


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
