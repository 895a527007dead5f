"""Checks of a host's network: its interfaces, the one towards the others, and names of hosts."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from mvd_scale.config.launcher import chosen_interfaces
from mvd_scale.distributed.interface import is_loopback
from mvd_scale.doctor.findings import Finding, HostCheck

_LOOKUPS = 16
"""Names that are looked up at the same time."""

_IFNAME = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Interface:
    """Network interface of this host."""

    name: str
    addresses: tuple[str, ...]
    up: bool

    speed: int
    """Mbit/s; 0 if the driver does not tell."""

    mtu: int
    """Largest packet in bytes."""

    def __str__(self) -> str:
        speed = f", {self.speed / 1000:g} Gbit/s" if self.speed else ""
        return f"{self.name} ({', '.join(self.addresses)}{speed})"


def network_checks(address: str | None, hosts: int) -> list[HostCheck]:
    """List the checks.

    Args:
        address: address where the ranks meet; None without a launcher.
        hosts: number of hosts of the job.
    """
    hung = "see the name servers in /etc/resolv.conf, and `ip addr`"
    return [
        HostCheck("network", "interfaces", lambda: chosen(own_interfaces(), chosen_interfaces(), address), 10, hung),
        HostCheck("network", "own name", lambda: own_name(socket.gethostname(), hosts, chosen_interfaces()), 15, hung),
    ]


def own_interfaces() -> list[Interface]:
    """List the interfaces of this host that have addresses, without the loopback."""
    states = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        families = (socket.AF_INET, socket.AF_INET6)
        addresses = tuple(entry.address.partition("%")[0] for entry in entries if entry.family in families)
        if addresses and not all(map(is_loopback, addresses)):
            state = states.get(name)
            there = (state.isup, state.speed, state.mtu) if state else (False, 0, 0)
            found.append(Interface(name, addresses, *there))
    return found


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
    elif not towards.up:
        yield Finding(name, "fail", f"{towards} is down", f"`ip link set {towards.name} up`", figures)
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
    """Find the interface by which packets to an address leave; None for the loopback, or without a way."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: the kernel chooses the way
            own = probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None
    return next((entry for entry in interfaces if own in entry.addresses), None)


def own_name(name: str, hosts: int, by_user: Mapping[str, str]) -> Iterator[Finding]:
    """Check the address of the name of this host, by which gloo finds its interface unless the user names one.

    Args:
        name: name of this host.
        hosts: number of hosts of the job.
        by_user: interfaces that the user has chosen, by variable.
    """
    check, addresses = "own name", resolve(name)
    loopback = bool(addresses) and all(map(is_loopback, addresses))
    figures = {"name": name, "addresses": addresses}
    said = f"{name} is {', '.join(addresses)}" if addresses else f"{name} is not known"
    if addresses and not loopback:
        yield Finding(check, "ok", said, figures=figures)
    elif hosts == 1:
        yield Finding(check, "ok", f"{said}; one host needs no other", figures=figures)
    elif _IFNAME in by_user:
        yield Finding(check, "ok", f"{said}; {_IFNAME} is {by_user[_IFNAME]}", figures=figures)
    else:
        remedy = (
            f"write the address of {name} into /etc/hosts in place of 127.0.1.1, or set {_IFNAME} to the interface "
            "towards the other hosts"
        )
        where = f"{said}, an address of this host alone" if loopback else said
        yield Finding(check, "warning", f"{where}: gloo would listen where no other host reaches it", remedy, figures)


def resolve(name: str) -> list[str]:
    """Addresses of a name, without repetition; none if it is not known."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


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
    if resolve(meeting_point):
        yield Finding("MASTER_ADDR", "ok", f"{meeting_point} is {', '.join(resolve(meeting_point))}")
    else:
        remedy = f"give its number as MASTER_ADDR, or write {meeting_point} into /etc/hosts"
        yield Finding("MASTER_ADDR", "fail", f"{meeting_point} is not known here", remedy)
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        found = dict(zip(others, pool.map(resolve, others.values()), strict=True))
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
