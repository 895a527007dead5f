"""Meeting of the hosts of a job: which of them coordinates, also after the first one is lost.

A host first asks all others. If one coordinates, it joins that: one whose ranks run before one that gathers hosts,
then the first in the hostfile. If none does, the first reachable host of the hostfile does: every host waits for those
before it, and asks again. Links that are cut can leave two coordinators: the one that gathers gives way as soon as it
finds the other, and the run folder does not take ranks of both.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from mvd_scale.distributed.interface import (
    is_loopback,
    list_outer_addresses,
    listen_at,
    own_interfaces,
    route_source,
)
from mvd_scale.elastic.coordinator import Phase
from mvd_scale.elastic.messages import MAX_BYTES, Connection, Message
from mvd_scale.errors import UserError

_CONNECT_SECONDS = 2.0
_MOST_THREADS = 64


@dataclass(frozen=True)
class Site:
    """This host among all hosts of a job."""

    hosts: tuple[str, ...]
    """Names or addresses of all hosts, without users, in the order of the hostfile."""
    name: str
    """Name of this host, one of `hosts`."""
    address: str
    """Own address at which other hosts reach this one."""
    port: int
    """Port of the coordinator on every host; 0 for a job on one host."""

    @property
    def others(self) -> list[str]:
        """All hosts but this one."""
        return [host for host in self.hosts if host != self.name]

    @property
    def index(self) -> int:
        """Number of hosts before this one."""
        return self.hosts.index(self.name)

    def listen(self) -> socket.socket | None:
        """Listen for the other hosts at the address of this one; None for a job on one host.

        Raises:
            UserError: the port is in use.
        """
        if len(self.hosts) == 1:
            return None
        try:
            return listen_at(self.address, self.port)
        except OSError as error:
            raise UserError(
                f"supervise cannot listen at {self.address} port {self.port} ({error.strerror}): choose another "
                "`--port`, the same on all hosts"
            ) from error

    def reach(self, host: str) -> socket.socket:
        """Connect to the coordinator's port of another host, from the own address.

        Raises:
            OSError: nobody listens there, or the host cannot be reached or is not known.
        """
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        address = str(socket.getaddrinfo(host, self.port, family, socket.SOCK_STREAM)[0][4][0])
        return socket.create_connection((address, self.port), _CONNECT_SECONDS, source_address=(self.address, 0))


def find_site(hosts: Sequence[str], named: str | None, port: int) -> Site:
    """Find this host among those of a job.

    Args:
        hosts: hosts of the hostfile, which may have users before an `@`; one host for a job on this one alone.
        named: name of this host in the hostfile; None to find it by its addresses.
        port: port of the coordinator.

    Raises:
        UserError: no host or several of the hostfile are this one, `named` is not among them, or is another host.
    """
    names = tuple(host.rpartition("@")[2] for host in hosts)
    if named is not None and named not in names:
        raise UserError(f"--host is {named}: expected a host of the hostfile, which has {', '.join(names)}")
    if len(names) == 1:
        return Site(names, names[0], "127.0.0.1", 0)
    own = _only_own(names) if named is None else named
    address = _own_address(own)
    if address is None:
        raise UserError(
            f"--host is {own}, which is no address of this host ({list_outer_addresses()}): give the line of the "
            "hostfile that is this host; if it is this one, write an address of this host there, on all hosts"
        )
    others = [name for name in names if name != own]
    if is_loopback(address) and (routed := _route_to(others)):
        # As Debian writes /etc/hosts: the other hosts know the name by another address.
        address = routed
    return Site(names, own, address, port)


def _only_own(names: Sequence[str]) -> str:
    """Name of this host among those of a hostfile, by its addresses.

    Raises:
        UserError: none of them is this host, or several.
    """
    own = [name for name in names if _own_address(name)]
    if len(own) > 1:
        raise UserError(
            f"the hostfile has {', '.join(names)}, of which {', '.join(own)} are all addresses of this host: name this "
            "host with `--host`, as the hostfile does"
        )
    if not own:
        raise UserError(
            f"the hostfile has {', '.join(names)}, of which none is an address of this host "
            f"({list_outer_addresses()}): write one there, or a name that this host resolves to one, on all hosts"
        )
    return own[0]


def find_coordinator(site: Site, hosts: Iterable[str]) -> str | None:
    """Host that coordinates, of those that are asked: one with running ranks first, then by order; None without one."""
    asked = list(hosts)
    if not asked:
        return None
    with ThreadPoolExecutor(min(len(asked), _MOST_THREADS)) as pool:
        phases = dict(zip(asked, pool.map(lambda host: _phase_of(site, host), asked), strict=True))
    found = [host for host, phase in phases.items() if phase is not None]
    return min(found, key=lambda host: (phases[host] == Phase.GATHERING.name, site.hosts.index(host)), default=None)


def is_better(site: Site, host: str) -> bool:
    """Whether another coordinator takes precedence over this host, which gathers hosts as a coordinator."""
    phase = _phase_of(site, host)
    return phase is not None and (phase != Phase.GATHERING.name or site.hosts.index(host) < site.index)


class JoinRefused(Exception):
    """Reason why a coordinator does not take a host in."""

    def __init__(self, reason: str, *, final: bool = True) -> None:
        super().__init__(reason)
        self.final = final
        """Whether it will not take it in later either."""


def join_coordinator(site: Site, host: str, hello: Message) -> Connection | None:
    """Join the coordinator of another host; None if it does not answer.

    Raises:
        JoinRefused: it does not take this host in.
    """
    with suppress(OSError, ValueError, KeyError):
        sock = site.reach(host)
        answer = _ask(sock, hello)
        if answer["kind"] == "welcome":
            return Connection(sock)
        sock.close()
        if answer["kind"] == "refused":
            raise JoinRefused(str(answer["reason"]), final=bool(answer["final"]))
    return None


def _phase_of(site: Site, host: str) -> str | None:
    with suppress(OSError, ValueError, KeyError), site.reach(host) as sock:
        answer = _ask(sock, {"kind": "probe"})
        if answer["kind"] == "coordinator":
            return str(answer["phase"])
    return None


def _ask(sock: socket.socket, question: Message) -> Message:
    """Send a message and wait for the answer, without reading beyond it."""
    sock.sendall(json.dumps(question).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_BYTES:
        byte = sock.recv(1)
        if not byte:
            raise ConnectionError("closed by the other host")
        line += byte
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError("no message of a supervised job")
    return answer


def addresses_of(host: str) -> list[str]:
    """Addresses of a host, those of IPv4 first; empty if its name is not known."""
    with suppress(socket.gaierror, UnicodeError):  # the latter for a name that is too long
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        return sorted(found, key=lambda address: (":" in address, address))
    return []


class AddressBook:
    """Addresses of hosts, looked up in threads: a name server that does not answer holds nobody up.

    One thread at a time may call the methods.
    """

    def __init__(self) -> None:
        self._answers: dict[str, list[str]] = {}
        self._searches: dict[str, threading.Thread] = {}

    def addresses(self, host: str) -> list[str]:
        """Addresses of a host by the last answer, none before the first; the name is looked up anew for a later call.

        An address that a host has no more is given until a lookup that began after the change has an answer.
        """
        known = self._answers.get(host, [])
        self.look_up(host)
        return known

    def look_up(self, host: str) -> None:
        """Begin to look up a host, unless that is under way."""
        search = self._searches.get(host)
        if search is None or not search.is_alive():
            # A daemon: the end of the process does not wait for the answer.
            self._searches[host] = threading.Thread(target=self._search, args=(host,), daemon=True)
            self._searches[host].start()

    def _search(self, host: str) -> None:
        # A name server that fails for a moment has told nothing of another address.
        if found := addresses_of(host):
            self._answers[host] = found


def _own_address(host: str) -> str | None:
    """Address of a host that is one of this host; None for another host."""
    own = {address for addresses in own_interfaces().values() for address in addresses}
    return next((address for address in addresses_of(host) if address in own or is_loopback(address)), None)


def _route_to(hosts: Iterable[str]) -> str | None:
    """Own address from which the first host that is known and not on this one is reached."""
    for host in hosts:
        for address in addresses_of(host):
            source = route_source(address, 9)
            if source is not None and not is_loopback(source):
                return source
    return None
