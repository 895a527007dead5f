"""Which host this one is, and which of several coordinators it joins."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from mvd_scale.elastic import meeting
from mvd_scale.elastic.meeting import AddressBook, Site, find_coordinator, find_site, is_better
from mvd_scale.errors import UserError
from tests.unit.elastic.test_supervisor import wait_until

SITE = Site(("node-1", "node-2", "node-3", "node-4"), "node-2", "10.0.0.2", 29400)


def test_one_host_needs_no_address() -> None:
    assert find_site(["node-1"], None, 29400) == Site(("node-1",), "node-1", "127.0.0.1", 0)
    assert find_site(["node-1"], None, 29400).listen() is None
    assert find_site(["me@node-1"], "node-1", 29400) == find_site(["node-1"], None, 29400)


def names(monkeypatch: pytest.MonkeyPatch, table: dict[str, str]) -> None:
    """Let names of hosts have these addresses, and this host those of 127.0.0.0/8."""

    def look_up(host: str, *_: object, **__: object) -> list[object]:
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (table[host], 0))]

    monkeypatch.setattr(meeting.socket, "getaddrinfo", look_up)


def test_a_host_finds_itself_by_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, {"node-1": "198.51.100.1", "node-2": "127.0.0.2"})
    monkeypatch.setattr(meeting, "route_source", lambda address, port: None)
    assert find_site(["node-1", "me@node-2"], None, 29400) == Site(("node-1", "node-2"), "node-2", "127.0.0.2", 29400)


def test_a_host_that_knows_itself_as_127_0_1_1_takes_the_address_that_leads_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names(monkeypatch, {"node-1": "127.0.1.1", "node-2": "198.51.100.2"})
    monkeypatch.setattr(meeting, "route_source", lambda address, port: {"198.51.100.2": "198.51.100.1"}[address])
    assert find_site(["node-1", "node-2"], None, 29400).address == "198.51.100.1"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (None, r"127\.0\.0\.1, 127\.0\.0\.2 are all addresses of this host: name this host with `--host`"),
        ("node-9", r"^--host is node-9: expected a host of the hostfile, which has 127\.0\.0\.1, 127\.0\.0\.2, 198"),
        ("198.51.100.1", r"^--host is 198\.51\.100\.1, which is no address of this host \(.+\): give the line of"),
    ],
)
def test_a_host_that_does_not_find_itself_says_so(named: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_site(["127.0.0.1", "127.0.0.2", "198.51.100.1"], named, 29400)


def test_none_of_the_hosts_is_this_one() -> None:
    with pytest.raises(UserError, match=r"of which none is an address of this host \(.+\): write one there") as error:
        find_site(["198.51.100.1", "198.51.100.2"], None, 29400)
    assert "--host" not in str(error.value), "it would not help"


def test_a_single_host_is_not_called_by_another_name() -> None:
    with pytest.raises(UserError, match=r"^--host is node-9: expected a host of the hostfile, which has node-1$"):
        find_site(["node-1"], "node-9", 29400)


def test_names_are_looked_up_beside_and_their_addresses_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, str] = {}
    names(monkeypatch, table)
    book = AddressBook()
    assert book.addresses("node-1") == []
    for address in ("10.0.0.1", "10.0.0.7"):
        table["node-1"] = address
        wait_until(lambda: book.addresses("node-1") == [table["node-1"]], address)
    # A name server that fails for a moment.
    table.clear()
    for _ in range(3):
        assert book.addresses("node-1") == ["10.0.0.7"]
        book._searches["node-1"].join()


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = threading.Event(), list[str]()

    def look_up(host: str) -> list[str]:
        asked.append(host)
        answers.wait(20)
        return ["10.0.0.1"]

    monkeypatch.setattr(meeting, "addresses_of", look_up)
    book = AddressBook()
    for _ in range(3):
        assert book.addresses("node-1") == []
    assert asked == ["node-1"]
    answers.set()
    book._searches["node-1"].join()
    assert book.addresses("node-1") == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("phases", "found"),
    [
        ({}, None),
        ({"node-3": "GATHERING"}, "node-3"),
        ({"node-1": "GATHERING", "node-3": "GATHERING"}, "node-1"),
        ({"node-1": "GATHERING", "node-3": "RUNNING"}, "node-3"),
        ({"node-3": "STOPPING", "node-4": "RUNNING"}, "node-3"),
        ({"node-1": "OVER"}, "node-1"),
    ],
)
def test_a_coordinator_whose_ranks_run_comes_first_then_the_first_host(
    phases: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_phase_of", lambda site, host: phases.get(host))
    assert find_coordinator(SITE, SITE.others) == found


@pytest.mark.parametrize(
    ("host", "phase", "better"),
    [
        ("node-1", "GATHERING", True),
        ("node-3", "GATHERING", False),
        ("node-3", "RUNNING", True),
        ("node-1", None, False),
    ],
)
def test_of_two_that_gather_the_first_stays(
    host: str, phase: str | None, better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_phase_of", lambda site, host: phase)
    assert is_better(SITE, host) is better


def test_a_port_in_use_is_an_error_with_the_option(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        site = Site(("127.0.0.1", "127.0.0.2"), "127.0.0.1", "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(
            UserError, match=r"cannot listen at 127\.0\.0\.1 port \d+ \(Address already in use\).*`--port`"
        ):
            site.listen()


def test_what_is_no_supervisor_does_not_coordinate() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        site = Site(("127.0.0.1", "127.0.0.2"), "127.0.0.2", "127.0.0.2", other.getsockname()[1])
        assert find_coordinator(site, ["127.0.0.1"]) is None
