"""Network interface by which a rank reaches the others.

Without a name in GLOO_SOCKET_IFNAME, gloo takes the address of the host's name, which on many hosts is a loopback
address or one of another network. A rank takes the interface instead whose address reaches MASTER_ADDR, on the host of
MASTER_ADDR itself the interface that has this address. Where MASTER_ADDR is a loopback address, the interface is the
loopback one, so that nothing of a job on one host can be reached from others; but where that is so by the host's own
/etc/hosts alone, and there are other hosts, the only other interface.

NCCL_SOCKET_IFNAME is set only there. On several hosts NCCL passes over loopback and Docker interfaces by itself, and
without InfiniBand it spreads the traffic over all the others; the name of one would take that from it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from ipaddress import ip_address

import psutil

from mvd_scale.errors import UserError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"

Interfaces = Mapping[str, list[str]]
"""Addresses, IPv4 and IPv6, of the network interfaces of this host by name."""


@dataclass(frozen=True)
class Endpoint:
    """Address of the rendezvous, as this host resolves it."""

    host: str
    """MASTER_ADDR: a name or an address."""
    port: int
    address: str
    """IPv4 or IPv6 address of the host."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches the address."""
        return is_loopback(self.address)


def own_interfaces() -> dict[str, list[str]]:
    """Addresses of the network interfaces of this host that are up, by name, those without a carrier as well.

    A host whose cable is unplugged still reaches itself by its address, and so may go on alone.
    """
    # psutil takes an interface without a carrier for down; releases before 5.9.3 have no flags.
    states = psutil.net_if_stats().items()
    up = {name for name, state in states if state.isup or "up" in getattr(state, "flags", "").split(",")}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }


def route_source(address: str, port: int) -> str | None:
    """Own address from which this host reaches another one; None without a route. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def choose_interface(
    endpoint: Endpoint, interfaces: Interfaces, source: Callable[[str, int], str | None] = route_source
) -> str:
    """Name of the interface by which this host reaches the rendezvous.

    Args:
        endpoint: address of the rendezvous.
        interfaces: interfaces of this host.
        source: function that returns the own address from which an address and port are reached.

    Raises:
        UserError: no interface has that own address; the message names the variable to set, and the interfaces.
    """
    own = source(endpoint.address, endpoint.port)
    names = [name for name, addresses in interfaces.items() if own in addresses]
    # An address of the whole host may stand on its loopback interface, which no other host reaches.
    fitting = [name for name in names if endpoint.is_loopback or not _has_loopback_address(interfaces[name])]
    if fitting:
        return fitting[0]
    raise UserError(
        f"no network interface of this host leads to MASTER_ADDR {endpoint.host}: set {GLOO} (with GPUs {NCCL} as "
        f"well) to the one that reaches the other hosts; there are {_list(interfaces)}"
    )


def outer_interfaces(interfaces: Interfaces) -> list[str]:
    """Names of the interfaces by which other hosts may reach this one, as far as their addresses tell."""
    return [
        name
        for name, addresses in interfaces.items()
        if not _has_loopback_address(addresses) and not all(ip_address(address).is_link_local for address in addresses)
    ]


def list_outer_addresses() -> str:
    """List the addresses of this host that others may reach, for a message; `it has none` without one."""
    listed = [address for found in own_interfaces().values() for address in found if not is_loopback(address)]
    return ", ".join(listed) or "it has none"


def set_interface(endpoint: Endpoint, environment: MutableMapping[str, str]) -> None:
    """Set GLOO_SOCKET_IFNAME, and for a job on one host NCCL_SOCKET_IFNAME, unless the user has set one of them.

    Raises:
        UserError: no interface leads to the rendezvous.
    """
    if _is_set(environment):
        return
    interface = choose_interface(endpoint, own_interfaces())
    environment[GLOO] = interface
    if endpoint.is_loopback:
        environment[NCCL] = interface


def set_only_interface(endpoint: Endpoint, environment: MutableMapping[str, str], *, gloo: bool) -> None:
    """Set GLOO_SOCKET_IFNAME to the only interface that others may reach, unless the user has set one of the variables.

    Args:
        endpoint: address of the rendezvous, which tells nothing of the way to other hosts.
        environment: variables of this process.
        gloo: whether ranks reduce over gloo. NCCL finds its interfaces by itself.

    Raises:
        UserError: ranks need gloo, and there are several such interfaces, or none.
    """
    if _is_set(environment):
        return
    interfaces = own_interfaces()
    found = outer_interfaces(interfaces)
    if len(found) == 1:
        environment[GLOO] = found[0]
    elif gloo:
        raise UserError(
            f"MASTER_ADDR {endpoint.host} is {endpoint.address} on its own host, which says of no network interface "
            f"that it leads to the other hosts: set {GLOO} to the one that does, or MASTER_ADDR to its address; there "
            f"are {_list(interfaces)}"
        )


def _is_set(environment: Mapping[str, str]) -> bool:
    return bool(environment.get(GLOO) or environment.get(NCCL))


def _list(interfaces: Interfaces) -> str:
    return ", ".join(f"{name} ({' '.join(addresses) or 'no address'})" for name, addresses in interfaces.items())


def listen_at(address: str, port: int) -> socket.socket:
    """Listen at one address of this host.

    Raises:
        OSError: the port is in use, or the address is not one of this host.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A port whose last connections still close counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def is_loopback(address: str) -> bool:
    """Whether only this host reaches an address."""
    return ip_address(address.partition("%")[0]).is_loopback


def _has_loopback_address(addresses: list[str]) -> bool:
    return any(is_loopback(address) for address in addresses)
