"""Checks of a host's network: its interfaces, the one towards the others, and names of hosts."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import psutil

from mvd_scale.config.launcher import chosen_interfaces
from mvd_scale.distributed.interface import GLOO, Interfaces, choose_interface, is_loopback, own_interfaces
from mvd_scale.distributed.rendezvous import resolve_endpoint
from mvd_scale.doctor.findings import Finding, HostCheck
from mvd_scale.elastic.meeting import addresses_of
from mvd_scale.errors import UserError

_LOOKUPS = 16
"""Names that are looked up at the same time."""

_PORT = 9
"""Port of an address to which the way is looked up; nothing is sent there."""


@dataclass(frozen=True)
class Interface:
    """Network interface of this host."""

    name: str
    addresses: tuple[str, ...]

    speed: int
    """Mbit/s; 0 if the driver does not tell."""

    mtu: int
    """Largest packet in bytes."""

    def __str__(self) -> str:
        speed = f", {self.speed / 1000:g} Gbit/s" if self.speed else ""
        return f"{self.name} ({', '.join(self.addresses)}{speed})"


def network_checks(address: str | None, hosts: int, by_user: Mapping[str, str]) -> list[HostCheck]:
    """List the checks.

    Args:
        address: address where the ranks meet; None without a launcher.
        hosts: number of hosts of the job.
        by_user: names of interfaces that the user has chosen, by variable.
    """
    hung = "see the name servers in /etc/resolv.conf, and `ip addr`"
    return [
        HostCheck("network", "interfaces", lambda: chosen(describe(own_interfaces()), by_user, address), 10, hung),
        HostCheck("network", "own name", lambda: own_name(socket.gethostname(), hosts, chosen_interfaces()), 15, hung),
    ]


def describe(interfaces: Interfaces) -> list[Interface]:
    """Describe those of the interfaces of this host that have addresses, without the loopback."""
    states = psutil.net_if_stats()
    return [
        Interface(name, tuple(addresses), states[name].speed, states[name].mtu)
        for name, addresses in interfaces.items()
        if not all(map(is_loopback, addresses))
    ]


def chosen(interfaces: Sequence[Interface], by_user: Mapping[str, str], address: str | None) -> Iterator[Finding]:
    """Check that interfaces which the user has chosen exist, and report the one towards the other hosts.

    Args:
        interfaces: interfaces of this host.
        by_user: names that the user has chosen, by variable.
        address: address where the ranks meet; None without a launcher.
    """
    name, figures = "interfaces", {"interfaces": [vars(entry) for entry in interfaces], **by_user}
    listed = ", ".join(map(str, interfaces)) or "none but the loopback"
    for variable, wanted in by_user.items():
        if not _exists(wanted, interfaces):
            remedy = f"set {variable} to one of {', '.join(entry.name for entry in interfaces) or 'lo'}, or unset it"
            yield Finding(name, "fail", f"{variable} is {wanted}, but there are {listed}", remedy, figures)
            return
    towards = interface_towards(address, interfaces) if address else None
    if towards is None:
        yield Finding(name, "ok", listed, figures=figures)
    else:
        yield Finding(name, "ok", f"{towards} towards {address}; {len(interfaces)} in all", figures=figures)


def _exists(wanted: str, interfaces: Sequence[Interface]) -> bool:
    """Whether one of the names in NCCL's form exists: a list of prefixes, `=` before whole names, `^` before others."""
    if wanted.startswith("^"):
        return True
    names = [*(entry.name for entry in interfaces), "lo"]
    if wanted.startswith("="):
        return any(name in names for name in wanted[1:].split(","))
    return any(name.startswith(part) for part in wanted.split(",") for name in names)


def interface_towards(address: str, interfaces: Sequence[Interface]) -> Interface | None:
    """Find the interface towards an address, as a run does; None for the loopback, or without a way."""
    by_name = {entry.name: entry for entry in interfaces}
    try:
        endpoint = resolve_endpoint(address, _PORT, timedelta(0))
        if endpoint.is_loopback:
            return None
        return by_name[choose_interface(endpoint, {name: list(entry.addresses) for name, entry in by_name.items()})]
    except UserError:
        return None


def own_name(name: str, hosts: int, interfaces: Mapping[str, str]) -> Iterator[Finding]:
    """Check the address of the name of this host, by which gloo finds its interface unless one is chosen.

    Args:
        name: name of this host.
        hosts: number of hosts of the job.
        interfaces: names of interfaces that the user, or else this program, has chosen, by variable.
    """
    check, addresses = "own name", addresses_of(name)
    loopback = bool(addresses) and all(map(is_loopback, addresses))
    figures = {"name": name, "addresses": addresses}
    said = f"{name} is {', '.join(addresses)}" if addresses else f"{name} is not known"
    if addresses and not loopback:
        yield Finding(check, "ok", said, figures=figures)
    elif hosts == 1:
        yield Finding(check, "ok", f"{said}; one host needs no other", figures=figures)
    elif GLOO in interfaces:
        yield Finding(check, "ok", f"{said}; {GLOO} is {interfaces[GLOO]}", figures=figures)
    else:
        remedy = (
            f"write the address of {name} into /etc/hosts in place of 127.0.1.1, or set {GLOO} to the interface "
            "towards the other hosts"
        )
        where = f"{said}, an address of this host alone" if loopback else said
        yield Finding(check, "warning", f"{where}: gloo would listen where no other host reaches it", remedy, figures)


def reverse(address: str) -> str:
    """Name of an address; empty if there is none."""
    try:
        return socket.gethostbyaddr(address)[0]
    except (OSError, UnicodeError):
        return ""


def names_of_others(meeting_point: str, others: Mapping[str, str]) -> Iterator[Finding]:
    """Look up the address where the ranks meet and the names of the other hosts, and the names of their addresses.

    Args:
        meeting_point: address or name where the ranks meet.
        others: names of the other hosts, by label.
    """
    if addresses := addresses_of(meeting_point):
        yield Finding("MASTER_ADDR", "ok", f"{meeting_point} is {', '.join(addresses)}")
    else:
        remedy = f"give its number as MASTER_ADDR, or write {meeting_point} into /etc/hosts"
        yield Finding("MASTER_ADDR", "fail", f"{meeting_point} is not known here", remedy)
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        found = dict(zip(others, pool.map(addresses_of, others.values()), strict=True))
        firsts = {label: addresses[0] for label, addresses in found.items() if addresses}
        names = dict(zip(firsts, pool.map(reverse, firsts.values()), strict=True))
    check, figures = "names of the other hosts", {"addresses": found, "names of addresses": names}
    unknown = [label for label, addresses in found.items() if not addresses]
    nameless = [label for label, name in names.items() if not name]
    if unknown:
        remedy = "write them into /etc/hosts or the name server; ssh and pdsh need them, the ranks themselves do not"
        yield Finding(check, "warning", f"not known here: {', '.join(unknown[:8])}", remedy, figures)
    elif nameless:
        yield Finding(check, "ok", f"{len(found)} known; {len(nameless)} without a reverse name", figures=figures)
    else:
        yield Finding(check, "ok", f"{len(found)} known, forward and reverse", figures=figures)
