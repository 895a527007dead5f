"""Reader of hostfiles: `python -m mvd_scale.distributed.hostfile FILE [NODE_RANK]` checks one before DeepSpeed does.

A hostfile has one line `HOST slots=N` for each host, N being its number of ranks; empty lines, and comments after `#`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mvd_scale.errors import UserError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+max[-_]slots=\d+)?")
_HOST = re.compile(r"(\w[\w.-]*@)?(\w[\w.-]*|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*(%\w+)?)")
"""Name or address of a host, also after the name of a user. Shells, ssh and pdsh would expand other signs."""

_SLOTS = re.compile(r"slots\s*[=:]?\s*(\S*)", re.IGNORECASE)
_MOST_SLOTS = 1024
"""More ranks than any host has devices or cores for."""


def read_hostfile(path: str) -> dict[str, int]:
    """Number of ranks of each host, in the order of the file.

    Raises:
        UserError: the file cannot be read, lists no hosts or one of them twice, or has a malformed line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UserError(f"hostfile {path} cannot be read: {reason}. Expected lines `HOST slots=N`") from error
    hosts: dict[str, int] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        host, slots = _entry(path, number, entry)
        earlier = lines.setdefault(host.lower(), number)
        if earlier != number:
            raise UserError(
                f"hostfile {path}:{number}: the host {host} is in line {earlier} already: give all its ranks in "
                "one line"
            )
        hosts[host] = slots
    if not hosts:
        raise UserError(f"hostfile {path} lists no hosts: expected lines `HOST slots=N`, N being the ranks of the host")
    return hosts


def is_host(text: str) -> bool:
    """Whether a text is the name or address of a host, which shells, ssh and pdsh take as it is."""
    return _HOST.fullmatch(text) is not None


def _entry(path: str, number: int, entry: str) -> tuple[str, int]:
    found = _LINE.fullmatch(entry)
    if found is None or entry.startswith("\ufeff"):
        told = _SLOTS.search(entry)
        fault = f"slots is {told[1]!r}" if told and told[1] else "it has no slots"
        if entry.startswith("\ufeff"):
            fault = "the file begins with a byte order mark, which DeepSpeed takes for a part of the name"
        raise UserError(
            f"hostfile {path}:{number}: {entry!r} is malformed, {fault}: expected `HOST slots=N`, N being the ranks of "
            "the host, one for each GPU"
        )
    if not is_host(found[1]):
        raise UserError(
            f"hostfile {path}:{number}: {found[1]!r} is no name or address of a host: write one line for each host, "
            "without ranges, quotes, ports and variables"
        )
    slots = int(found[2])
    if not 1 <= slots <= _MOST_SLOTS:
        raise UserError(
            f"hostfile {path}:{number}: slots={found[2]} of the host {found[1]}, expected 1 to {_MOST_SLOTS}: remove "
            "the line of a host that shall have no ranks"
        )
    return found[1], slots


def check_node_rank(path: str, hosts: int, rank: str) -> None:
    """Check that the number of a host, from 0, belongs to one of the hosts of a file.

    Raises:
        UserError: it does not.
    """
    if not rank.isdecimal() or int(rank) >= hosts:
        raise UserError(f"NODE_RANK is {rank}, but the hostfile {path} has {hosts} hosts: expected 0 to {hosts - 1}")


def main() -> None:
    """Check a hostfile, and exit with one message and code 2 if something is wrong with it."""
    try:
        hosts = read_hostfile(sys.argv[1])
        for rank in sys.argv[2:]:
            check_node_rank(sys.argv[1], len(hosts), rank)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
