"""Choice of the network interface, and the address at which the store of the rendezvous listens."""

from __future__ import annotations

import os
import resource
import socket
from datetime import timedelta

import psutil
import pytest
import torch

from mvd_scale.distributed import interface, rendezvous
from mvd_scale.distributed.free_port import free_port
from mvd_scale.distributed.interface import (
    GLOO,
    NCCL,
    Endpoint,
    choose_interface,
    own_interfaces,
    route_source,
    set_interface,
)
from mvd_scale.distributed.rendezvous import choose_way, has_own_meaning_here, open_store, resolve_endpoint
from mvd_scale.errors import UserError

INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.168.7.4"], "ib0": ["10.0.0.4", "fd00::4"], "spare": []}
REMOTE = Endpoint("node-1", 29500, "10.0.0.1")
HERE = Endpoint("127.0.0.1", 29500, "127.0.0.1")


@pytest.mark.parametrize(
    ("endpoint", "own", "name"),
    [(REMOTE, "10.0.0.4", "ib0"), (Endpoint("node-1", 29500, "fd00::1"), "fd00::4", "ib0"), (HERE, "127.0.0.1", "lo")],
)
def test_the_interface_is_the_one_whose_address_reaches_the_rendezvous(endpoint: Endpoint, own: str, name: str) -> None:
    assert choose_interface(endpoint, INTERFACES, lambda address, port: own) == name


@pytest.mark.parametrize("own", [None, "172.17.0.1", "127.0.0.1"])
def test_without_one_the_error_names_the_variable_and_all_interfaces(own: str | None) -> None:
    with pytest.raises(UserError) as error:
        choose_interface(REMOTE, INTERFACES, lambda address, port: own)
    said = str(error.value)
    assert f"MASTER_ADDR node-1: set {GLOO} (with GPUs {NCCL} as well)" in said
    assert "lo (127.0.0.1 ::1), eth0 (192.168.7.4), ib0 (10.0.0.4 fd00::4), spare (no address)" in said


def test_a_job_on_one_host_stays_on_its_loopback_interface() -> None:
    environment: dict[str, str] = {}
    set_interface(HERE, environment)
    assert environment == {GLOO: "lo", NCCL: "lo"}


def test_between_hosts_only_gloo_needs_a_name() -> None:
    address = next((a for n, found in own_interfaces().items() if n != "lo" for a in found if "." in a), None)
    if address is None:
        pytest.skip("this machine has a loopback interface alone")
    environment: dict[str, str] = {}
    set_interface(Endpoint("node-1", 29500, address), environment)
    assert environment.keys() == {GLOO}
    assert address in own_interfaces()[environment[GLOO]]


@pytest.mark.parametrize("name", [GLOO, NCCL])
def test_a_name_that_the_user_has_set_stays(name: str) -> None:
    environment = {name: "ib3"}
    set_interface(HERE, environment)
    assert environment == {name: "ib3"}


def test_the_own_address_is_found_without_a_packet() -> None:
    assert route_source("127.0.0.1", 9) == "127.0.0.1"


def test_a_name_that_is_never_known_is_named() -> None:
    with pytest.raises(UserError, match=r"^MASTER_ADDR 'no such host' has no address \(.+\): set it to"):
        resolve_endpoint("no such host", 29500, timedelta(0))


def test_a_name_that_is_known_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([socket.gaierror(socket.EAI_NONAME, "not known"), [(0, 0, 0, "", ("10.0.0.1", 29500))]])

    def look_up(*_: object, **__: object) -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("mvd_scale.distributed.rendezvous._RETRY_SECONDS", 0)
    assert resolve_endpoint("node-1", 29500, timedelta(minutes=1)) == REMOTE


DEBIAN = Endpoint("node-1", 29500, "127.0.1.1")


def test_a_host_that_knows_itself_by_a_loopback_address_is_told_before_the_others_wait() -> None:
    with pytest.raises(UserError, match=r"^MASTER_ADDR node-1 is 127\.0\.1\.1 on its own host, .* 127\.0\.0\.1 for"):
        has_own_meaning_here(DEBIAN, several_hosts=True)
    assert not has_own_meaning_here(DEBIAN, several_hosts=False)
    for meant in (Endpoint("localhost", 29500, "127.0.0.1"), HERE):
        assert not has_own_meaning_here(meant, several_hosts=True)


def test_under_torchrun_whose_store_listens_everywhere_no_interface_follows_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert has_own_meaning_here(DEBIAN, several_hosts=True)


LO, ETH = {"lo": ["127.0.0.1", "::1"]}, {"eth0": ["192.168.7.4", "fe80::4"]}
UNUSED = {"spare": [], "usb0": ["fe80::9"]}


@pytest.mark.parametrize(
    ("interfaces", "device", "chosen"),
    [
        (LO | ETH | UNUSED, "cpu", {GLOO: "eth0"}),
        (LO | ETH | UNUSED, "cuda", {GLOO: "eth0"}),
        (INTERFACES, "cuda", {}),
        (LO, "cuda", {}),
    ],
)
def test_under_torchrun_a_host_that_knows_itself_by_a_loopback_address_takes_its_only_other_interface(
    interfaces: dict[str, list[str]], device: str, chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL, by which ranks on GPUs reduce, chooses for itself among several."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(interface, "own_interfaces", lambda: interfaces)
    environment: dict[str, str] = {}
    choose_way(DEBIAN, environment, several_hosts=True, device=torch.device(device))
    assert environment == chosen


@pytest.mark.parametrize("interfaces", [INTERFACES, LO | UNUSED])
def test_where_that_is_not_one_ranks_on_cpus_ask_for_it(
    interfaces: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(interface, "own_interfaces", lambda: interfaces)
    with pytest.raises(UserError) as error:
        choose_way(DEBIAN, {}, several_hosts=True, device=torch.device("cpu"))
    said = str(error.value)
    assert said.startswith("MASTER_ADDR node-1 is 127.0.1.1 on its own host, which says of no network interface")
    assert f"set {GLOO} to the one that does" in said
    assert all(name in said for name in interfaces)
    environment = {NCCL: "ib0"}
    choose_way(DEBIAN, environment, several_hosts=True, device=torch.device("cpu"))
    assert environment == {NCCL: "ib0"}, "as the user says"


def listening_addresses() -> set[str]:
    """Local addresses at which this process listens."""
    found = [connection for connection in psutil.net_connections("inet") if connection.pid == os.getpid()]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def test_the_store_listens_at_the_address_of_the_rendezvous_alone() -> None:
    before = listening_addresses()
    endpoint = Endpoint("127.0.0.2", free_port(host="127.0.0.2"), "127.0.0.2")
    store = open_store(endpoint, 0, 1, timedelta(seconds=10))
    assert listening_addresses() - before == {"127.0.0.2"}
    store.set("key", "value")
    other = open_store(endpoint, 1, 1, timedelta(seconds=10))
    assert other.get("key") == b"value"


def test_ranks_that_an_agent_has_restarted_see_nothing_of_the_attempt_before(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint("127.0.0.1", free_port(), "127.0.0.1")
    served = torch.distributed.TCPStore("127.0.0.1", endpoint.port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        stores = [open_store(endpoint, rank, 2, timedelta(seconds=10)) for rank in range(2)]
        assert not stores[1].check(["answer"])
        stores[0].set("answer", "yes")
        assert stores[1].get("answer") == b"yes"
    del served


def test_a_port_in_use_is_an_error_of_the_rendezvous() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(torch.distributed.DistNetworkError, match=r"Address already in use"):
            open_store(Endpoint("127.0.0.1", taken.getsockname()[1], "127.0.0.1"), 0, 1, timedelta(seconds=1))


@pytest.mark.parametrize(("soft", "hard", "ranks", "set_to"), [(1024, 4096, 2, None), (1024, 65536, 4096, 12544)])
def test_rank_0_may_open_a_file_for_each_connection(
    soft: int, hard: int, ranks: int, set_to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda what, both: limits.append(both))
    rendezvous._allow_connections(ranks)
    assert limits == ([] if set_to is None else [(set_to, hard)])


def test_more_ranks_than_rank_0_may_have_files_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    with pytest.raises(UserError, match=r"may open 4096 files, but the connections of 2000 ranks need 6256: raise the"):
        rendezvous._allow_connections(2000)
