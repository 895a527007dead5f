"""Interfaces, the own name, and names of the other hosts."""

from __future__ import annotations

import socket

import pytest

from mvd_scale.doctor.checks import network
from mvd_scale.doctor.checks.network import (
    Interface,
    chosen,
    interface_towards,
    names_of_others,
    own_interfaces,
    own_name,
)

ETH = Interface("eth0", ("10.0.0.2",), True, 25_000, 9000)
IB = Interface("ib0", ("10.1.0.2", "fd00::2"), True, 0, 2044)
BOTH = (ETH, IB)


def test_interfaces_of_this_host_have_addresses_and_are_no_loopback() -> None:
    for interface in own_interfaces():
        assert interface.addresses
        assert "127.0.0.1" not in interface.addresses


@pytest.mark.parametrize("wanted", ["eth0", "eth", "=eth0,foo", "^docker", "lo", "ib,eth"])
def test_a_chosen_interface_that_exists(wanted: str) -> None:
    (finding,) = chosen(BOTH, {"GLOO_SOCKET_IFNAME": wanted}, None)
    assert finding.outcome == "ok"


@pytest.mark.parametrize("wanted", ["eth1", "=eth", "enp"])
def test_a_chosen_interface_that_does_not_exist(wanted: str) -> None:
    (finding,) = chosen(BOTH, {"NCCL_SOCKET_IFNAME": wanted}, None)
    assert finding.outcome == "fail"
    assert finding.detail.startswith(f"NCCL_SOCKET_IFNAME is {wanted}, but there are eth0 (10.0.0.2, 25 Gbit/s), ib0")
    assert finding.remedy == "set NCCL_SOCKET_IFNAME to one of eth0, ib0, or unset it"


def test_the_interface_towards_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interface_towards", lambda address, interfaces: ETH)
    (finding,) = chosen(BOTH, {}, "10.0.0.1")
    assert finding.detail == "eth0 (10.0.0.2, 25 Gbit/s) towards 10.0.0.1; 2 in all"
    down = Interface("eth0", ("10.0.0.2",), False, 0, 1500)
    monkeypatch.setattr(network, "interface_towards", lambda address, interfaces: down)
    (finding,) = chosen(BOTH, {}, "10.0.0.1")
    assert (finding.outcome, finding.remedy) == ("fail", "`ip link set eth0 up`")


def test_no_interface_leads_to_the_loopback_or_an_unknown_name() -> None:
    assert interface_towards("127.0.0.1", BOTH) is None
    assert interface_towards("no.such.host.invalid", BOTH) is None


@pytest.mark.parametrize(
    ("addresses", "hosts", "by_user", "outcome"),
    [
        (["10.0.0.2"], 2, {}, "ok"),
        (["127.0.1.1"], 1, {}, "ok"),
        (["127.0.1.1"], 2, {}, "warning"),
        (["::1"], 2, {}, "warning"),
        ([], 2, {}, "warning"),
        (["127.0.1.1"], 2, {"GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
    ],
)
def test_the_own_name(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], hosts: int, by_user: dict[str, str], outcome: str
) -> None:
    monkeypatch.setattr(network, "resolve", lambda name: addresses)
    (finding,) = own_name("node-1", hosts, by_user)
    assert finding.outcome == outcome
    assert ("GLOO_SOCKET_IFNAME" in finding.remedy) == (outcome == "warning")


def test_names_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"master": ["10.0.0.1"], "node-2": ["10.0.0.2"], "node-3": ["10.0.0.3"]}
    monkeypatch.setattr(network, "resolve", lambda name: known.get(name, []))
    monkeypatch.setattr(network, "reverse", lambda address: "" if address == "10.0.0.3" else "a name")
    point, others = names_of_others("master", {"two": "node-2"})
    assert (point.outcome, others.outcome) == ("ok", "ok")
    assert others.detail == "1 known, forward and reverse"
    _, others = names_of_others("master", {"two": "node-2", "three": "node-3"})
    assert (others.outcome, others.detail) == ("ok", "2 known; 1 without a reverse name")
    point, others = names_of_others("nobody", {"two": "node-2", "four": "node-4"})
    assert point.outcome == "fail"
    assert "/etc/hosts" in point.remedy
    assert (others.outcome, others.detail) == ("warning", "not known here: four")


def test_look_ups_do_not_raise() -> None:
    assert network.resolve("localhost")
    assert network.resolve("no.such.host.invalid") == []
    assert network.resolve("x" * 300) == []
    assert network.reverse("203.0.113.1") in ("", socket.getfqdn("203.0.113.1"))
