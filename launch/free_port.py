"""Print a free TCP port of this machine; with a port as argument, check that it is free and print it."""

import socket
import sys


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "0"
    if not wanted.isdecimal() or int(wanted) > 65535:
        sys.exit(f"error: MASTER_PORT is {wanted!r}, expected a number up to 65535")
    with socket.socket() as probe:
        # The store of the ranks sets this option too: a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(wanted)))
        except OSError as error:
            sys.exit(f"error: port {wanted} cannot be used ({error.strerror}): choose another MASTER_PORT")
        print(probe.getsockname()[1])


if __name__ == "__main__":
    main()
