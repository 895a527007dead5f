"""Interfaces, the own name, and names of the other hosts."""

from __future__ import annotations

import socket

import pytest

from mvd_scale.distributed.interface import own_interfaces
from mvd_scale.doctor.checks import network
from mvd_scale.doctor.checks.network import (
    Interface,
    chosen,
    describe,
    interface_towards,
    names_of_others,
    network_checks,
    own_name,
)
from mvd_scale.elastic.meeting import addresses_of

ETH = Interface("eth0", ("10.0.0.2",), 25_000, 9000)
IB = Interface("ib0", ("10.1.0.2", "fd00::2"), 0, 2044)
BOTH = (ETH, IB)


def test_interfaces_of_this_host_have_addresses_and_are_no_loopback() -> None:
    for interface in describe(own_interfaces()):
        assert interface.addresses
        assert "127.0.0.1" not in interface.addresses
        assert interface.mtu > 0


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


def test_the_interface_is_the_one_that_a_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "choose_interface", lambda endpoint, interfaces: list(interfaces)[1])
    assert interface_towards("10.1.0.1", BOTH) is IB


def test_the_interface_that_the_program_chose_serves_the_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "addresses_of", lambda name: ["127.0.1.1"])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    interfaces, own = (check.findings()[0] for check in network_checks(None, 2, {}))
    assert (interfaces.outcome, own.outcome) == ("ok", "ok")
    assert own.detail.endswith("GLOO_SOCKET_IFNAME is eth9")


def test_no_interface_leads_to_the_loopback_or_an_unknown_name() -> None:
    assert interface_towards("127.0.0.1", BOTH) is None
    assert interface_towards("no.such.host.invalid", BOTH) is None


@pytest.mark.parametrize(
    ("addresses", "hosts", "interfaces", "outcome"),
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
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], hosts: int, interfaces: dict[str, str], outcome: str
) -> None:
    monkeypatch.setattr(network, "addresses_of", lambda name: addresses)
    (finding,) = own_name("node-1", hosts, interfaces)
    assert finding.outcome == outcome
    assert ("GLOO_SOCKET_IFNAME" in finding.remedy) == (outcome == "warning")


def test_names_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"master": ["10.0.0.1"], "node-2": ["10.0.0.2"], "node-3": ["10.0.0.3"]}
    monkeypatch.setattr(network, "addresses_of", lambda name: known.get(name, []))
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
    assert addresses_of("localhost")
    assert addresses_of("no.such.host.invalid") == []
    assert addresses_of("x" * 300) == []
    assert network.reverse("203.0.113.1") in ("", socket.getfqdn("203.0.113.1"))
