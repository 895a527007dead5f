"""Hosts of a job examine each other; those that are missing, late or hung are findings, and the others go on."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from mvd_scale.config.launcher import LaunchedRank, launched_rank
from mvd_scale.distributed.free_port import free_port
from mvd_scale.doctor import all_hosts
from mvd_scale.doctor import meeting as meeting_module
from mvd_scale.doctor.all_hosts import Examined, examine_all
from mvd_scale.doctor.checks import folder, links
from mvd_scale.doctor.findings import Finding, HostCheck
from mvd_scale.doctor.meeting import Meeting, NoAnswer, diagnose, open_store
from mvd_scale.doctor.settings import Settings
from mvd_scale.errors import UserError
from tests.unit.doctor.conftest import Meet, seat

Examine = Callable[..., list[Examined | None]]


def place(rank: int, world_size: int, port: int, **other: Any) -> LaunchedRank:
    values: dict[str, Any] = {
        "rank": rank, "local_rank": 0, "world_size": world_size, "host": str(rank), "hosts": world_size,
        "address": "127.0.0.1", "port": port, "store_of_agent": False, "attempt": 0,
    }  # fmt: skip
    return LaunchedRank(**{**values, **other})


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Examine:
    """Examine hosts as threads; checks of a host alone are replaced by one that is sound."""
    monkeypatch.setattr(all_hosts, "host_checks", lambda settings, device, rank, by_user: [sound(rank)])
    monkeypatch.setattr(all_hosts, "facts_check", facts)
    # The interface would be chosen for the whole process of the tests.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(links, "_BYTES", {"cpu": (2**16,)})
    monkeypatch.setattr(folder, "_SEEN", 1.0)

    def run(places: list[LaunchedRank], **settings: Any) -> list[Examined | None]:
        chosen = Settings(**{"folder": tmp_path, "wait": 10.0, **settings})
        with ThreadPoolExecutor(len(places)) as pool:
            return list(pool.map(lambda rank: examine_all(rank, chosen), places))

    return run


def sound(rank: LaunchedRank) -> HostCheck:
    return HostCheck("machine", "own", lambda: [Finding("own", "ok", f"of rank {rank.rank}")], 5, "mend it")


def facts(collected: dict[str, Any]) -> HostCheck:
    def collect() -> list[Finding]:
        collected.update(versions={"torch": "2.14.1"}, capabilities={"DALI": ""})
        return []

    return HostCheck("versions", "versions", collect, 5, "mend it")


def by_check(examined: Examined | None) -> dict[tuple[str, str], Finding]:
    assert examined is not None
    return {(finding.check, finding.host): finding for finding in examined.findings}


def test_rank_0_has_the_findings_of_all_hosts(examine: Examine) -> None:
    port = free_port()
    first, second, third = examine([place(rank, 3, port) for rank in range(3)])
    assert second is None
    assert third is None
    assert first is not None
    name = socket.gethostname()
    assert first.hosts == (f"{name}#0", f"{name}#1", f"{name}#2")
    assert first.ranks == 3
    found = by_check(first)
    assert [found["own", host].detail for host in first.hosts] == ["of rank 0", "of rank 1", "of rank 2"]
    assert found["torch", ""].outcome == "ok"
    assert found["all-reduce", ""].detail.startswith("gloo, 3 ranks: ")
    assert found["pairs of hosts", ""].detail.startswith("3 of 3: ")
    assert found["presence", ""].detail == "3 hosts with 3 ranks: all that the launcher counts"
    for check in ("clock", "shared folder", "MASTER_ADDR"):
        assert [found[check, host].outcome for host in first.hosts] == ["ok", "ok", "ok"]
    assert all(finding.group for finding in first.findings)
    json.dumps([finding.figures for finding in first.findings])


def test_other_ranks_of_a_host_take_part_in_the_all_reduce(examine: Examine) -> None:
    port = free_port()
    places = [place(rank, 4, port, local_rank=rank % 2, host=str(rank // 2), hosts=2) for rank in range(4)]
    first, *others = examine(places)
    assert others == [None, None, None]
    found = by_check(first)
    assert found["all-reduce", ""].detail.startswith("gloo, 4 ranks: ")
    assert found["presence", ""].detail == "2 hosts with 4 ranks: all that the launcher counts"


def test_a_single_group_of_checks(examine: Examine) -> None:
    port = free_port()
    places = [place(0, 2, port), place(1, 2, port, local_rank=1, host="0")]
    first, second = examine(places, groups=frozenset({"machine"}))
    assert second is None
    assert {finding.group for finding in by_check(first).values()} == {"hosts", "machine"}


def test_a_host_that_is_missing_is_named_and_the_others_go_on(examine: Examine) -> None:
    port = free_port()
    hosts = {"north": 1, "south": 1, "west": 1}
    started = time.monotonic()
    first, second = examine([place(rank, 3, port) for rank in (0, 2)], wait=1.0, hosts=hosts)
    assert time.monotonic() - started < 15
    assert second is None
    assert first is not None
    assert first.hosts == ("north", "west")
    found = by_check(first)
    presence = found["presence", ""]
    assert presence.outcome == "fail"
    assert presence.detail.endswith("within 1 s there was nothing of ranks 1: south")
    assert f"nc -vz 127.0.0.1 {port}" in presence.remedy
    assert found["all-reduce", ""].detail.startswith("gloo, 2 ranks: ")


def test_a_missing_host_without_a_hostfile_has_the_number_of_the_launcher(examine: Examine) -> None:
    (first,) = examine([place(0, 2, free_port())], wait=0.5)
    assert by_check(first)["presence", ""].detail.endswith("ranks 1: host number 1 of the launcher")


def test_a_host_that_does_not_reach_rank_0_has_its_own_report(examine: Examine) -> None:
    port = free_port()
    (examined,) = examine([place(1, 2, port)], wait=0.5)
    found = by_check(examined)
    host = socket.gethostname()
    meeting = found["meeting", host]
    assert meeting.outcome == "fail"
    assert meeting.detail.startswith(f"rank 1 does not meet rank 0 at 127.0.0.1:{port}: nothing listens")
    assert found["own", host].outcome == "ok"


def test_a_name_that_is_not_known_is_the_reason(examine: Examine) -> None:
    (examined,) = examine([place(1, 2, 29500, address="no.such.host.invalid")], wait=0.5)
    found = by_check(examined)
    assert "MASTER_ADDR 'no.such.host.invalid' has no address" in found["meeting", socket.gethostname()].detail


def test_a_port_in_use_is_a_finding(examine: Examine) -> None:
    with socket.create_server(("", 0)) as taken:
        (examined,) = examine([place(0, 2, taken.getsockname()[1])], wait=0.5)
    assert by_check(examined)["meeting", socket.gethostname()].outcome == "fail"


def test_versions_that_differ_are_found(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    releases = iter(["2.14.1", "2.13.0"])

    def other_facts(collected: dict[str, Any]) -> HostCheck:
        collected.update(versions={"torch": next(releases)}, capabilities={"DALI": ""})
        return HostCheck("versions", "versions", list, 5, "mend it")

    monkeypatch.setattr(all_hosts, "facts_check", other_facts)
    port = free_port()
    first, _ = examine([place(rank, 2, port) for rank in range(2)])
    torch = by_check(first)["torch", ""]
    assert torch.outcome == "fail"
    assert "2.14.1 on" in torch.detail
    assert "2.13.0 on" in torch.detail


def test_a_host_that_hangs_is_a_finding(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_hosts, "_ALONE_SECONDS", 1.0)
    monkeypatch.setattr(all_hosts, "_COLLECT_SECONDS", 0.5)
    ended = threading.Event()

    def checks(settings: Settings, device: str, rank: LaunchedRank, by_user: Mapping[str, str]) -> list[HostCheck]:
        if rank.rank == 1:
            ended.wait(60)
        return [sound(rank)]

    monkeypatch.setattr(all_hosts, "host_checks", checks)
    port = free_port()

    def leading(rank: LaunchedRank) -> None:
        if rank.rank == 0:
            ended.set()

    whole = all_hosts._collect

    def collect(meeting: Meeting, rank: LaunchedRank, settings: Settings) -> Examined:
        collected = whole(meeting, rank, settings)
        leading(rank)
        return collected

    monkeypatch.setattr(all_hosts, "_collect", collect)
    first, late = examine([place(rank, 2, port) for rank in range(2)])
    host = f"{socket.gethostname()}#1"
    answer = by_check(first)["answer", host]
    assert answer.outcome == "fail"
    assert answer.detail.startswith("its findings do not come")
    assert late is None or any(finding.outcome == "fail" for finding in late.findings)


def test_a_host_that_dies_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_SILENT", 0.3)
    store = HashStore()
    lead, dead = Meeting(store, seat(0)), Meeting(store, seat(1))
    lead.assemble(2, 1)
    dead.put("beat/1", 7)
    started = time.monotonic()
    assert lead.begin("names", 60)[0] == [0]
    assert time.monotonic() - started < 10


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting, ended = Meeting(HashStore(), seat(0)), threading.Event()
    monkeypatch.setattr(meeting_module, "_SILENT", 0.1)
    monkeypatch.setattr(meeting_module, "_MARGIN", 0.1)
    monkeypatch.setattr(meeting, "_store", Hung(ended))
    for ask in (lambda: meeting.has("x"), lambda: meeting.put("x", 1), lambda: meeting.get("x", 0.1)):
        with pytest.raises(NoAnswer, match="answer"):
            ask()
    ended.set()


class Hung:
    """A store over a link that is cut."""

    def __init__(self, ended: threading.Event) -> None:
        self.set = self.check = self.wait = lambda *arguments: ended.wait(60)


def test_a_host_that_lives_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_SILENT", 0.3)
    monkeypatch.setattr(meeting_module, "_BEAT", 0.05)
    store = HashStore()
    lead, slow = Meeting(store, seat(0)), Meeting(store, seat(1))
    lead.assemble(2, 1)
    slow.live()
    threading.Timer(1.0, lambda: slow.put("names/ready/1", True)).start()
    lead.put("names/ready/0", True)
    assert lead.begin("names", 60)[0] == [0, 1]


def test_unknown_hosts_of_between_are_a_finding(examine: Examine) -> None:
    port = free_port()
    hosts = {"north": 1, "south": 1}
    first, _ = examine([place(rank, 2, port) for rank in range(2)], hosts=hosts, between=("north", "east"))
    faults = [finding for finding in by_check(first).values() if finding.outcome == "fail"]
    assert [finding.detail for finding in faults] == ["--between names east, which did not come"]
    assert faults[0].remedy == "give some of north, south"


def test_a_rank_that_comes_too_late_is_told(meet: Meet) -> None:
    store = HashStore()
    lead = Meeting(store, seat(0))
    lead.assemble(2, 0.1)
    late = Meeting(store, seat(1))
    with pytest.raises(NoAnswer, match="did not wait for this rank"):
        late.assemble(2, 1)


def test_a_rank_that_comes_long_before_rank_0_waits_for_its_roster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_MARGIN", 0.2)
    store = HashStore()
    early = Meeting(store, seat(1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(early.assemble, 3, 0.8)
        time.sleep(0.6)
        Meeting(store, seat(0)).assemble(3, 0.8)  # there is no third rank: it waits to the end
        waiting.result()
    assert [one.rank for one in early.seats] == [0, 1]


def test_slow_checks_of_rank_0_do_not_hold_up_the_roster(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_MARGIN", 0.5)

    def checks(settings: Settings, device: str, rank: LaunchedRank, by_user: Mapping[str, str]) -> list[HostCheck]:
        if rank.rank == 0:
            time.sleep(2.0)
        return [sound(rank)]

    monkeypatch.setattr(all_hosts, "host_checks", checks)
    port = free_port()
    first, second = examine([place(rank, 2, port) for rank in range(2)], wait=1.0)
    assert second is None
    assert by_check(first)["presence", ""].outcome == "ok"


def test_a_host_gives_signs_of_life_while_it_waits_for_the_roster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(meeting_module, "_BEAT", 0.05)
    port = free_port()
    lead, other = [Meeting(open_store(place(rank, 2, port), 5), seat(rank)) for rank in range(2)]
    other.live()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.assemble, 2, 5)
        time.sleep(0.2)
        before = lead.get("beat/1", 5)
        time.sleep(0.5)
        after = lead.get("beat/1", 5)
        lead.assemble(2, 5)
        waiting.result()

    def gone(key: str, value: Any) -> None:
        raise NoAnswer

    monkeypatch.setattr(other, "put", gone)  # ends its thread, which would hold the store at the end of the process
    time.sleep(0.2)
    assert after > before


def test_the_interface_that_the_program_chose_is_not_the_user_s(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def checks(settings: Settings, device: str, rank: LaunchedRank, by_user: Mapping[str, str]) -> list[HostCheck]:
        seen[rank.rank] = dict(by_user)
        return [sound(rank)]

    monkeypatch.setattr(all_hosts, "host_checks", checks)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    examine([place(0, 1, free_port())])
    assert seen == {0: {}}
    assert os.environ["GLOO_SOCKET_IFNAME"]


def test_a_host_that_is_apart_has_its_name_in_the_hostfile(examine: Examine) -> None:
    (examined,) = examine([place(1, 2, free_port())], wait=0.5, hosts={"north": 1, "south": 1})
    assert by_check(examined)["own", "south"].outcome == "ok"


def test_hosts_of_the_same_name_have_different_labels() -> None:
    store = HashStore()
    seats = [seat(0, name="vm"), seat(1, name="vm"), seat(2, name="other"), seat(3, host="1", local_rank=1, name="vm")]
    lead, *_ = [Meeting(store, one) for one in seats]
    lead.assemble(4, 1)
    assert [one.label for one in lead.seats] == ["vm#0", "vm#1", "other", "vm#1"]
    assert [one.rank for one in lead.hosts] == [0, 1, 2]
    assert lead.device == "cpu"


def test_a_host_without_gpu_is_a_fault(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_hosts, "own_seat", lambda rank: seat(rank.rank, device="cuda" if rank.rank else "cpu"))
    port = free_port()
    first, _ = examine([place(rank, 2, port) for rank in range(2)])
    found = by_check(first)
    assert found["devices", ""].detail == "no GPU on node-0, and GPUs on others"
    assert found["all-reduce", ""].figures["backend"] == "gloo"


def test_the_launcher_is_read() -> None:
    deepspeed = {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n", "MASTER_PORT": "29500",
        "CROSS_RANK": "1", "CROSS_SIZE": "2",
    }  # fmt: skip
    assert launched_rank(deepspeed) == LaunchedRank(3, 1, 4, "1", 2, "n", 29500, False, 0)
    torchrun = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "n", "MASTER_PORT": "29500",
        "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }  # fmt: skip
    assert launched_rank(torchrun) == LaunchedRank(0, 0, 1, "0", 1, "n", 29500, True, 2)
    assert launched_rank({}) is None
    with pytest.raises(UserError, match="WORLD_SIZE, MASTER_ADDR are not set"):
        launched_rank({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"})


def test_a_store_of_an_agent_is_only_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    port = free_port()
    served = open_store(place(0, 2, port), 5)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    first, second = (open_store(place(rank, 2, port, store_of_agent=True), 5) for rank in range(2))
    first.set("key", "value")
    assert second.get("key") == b"value"
    # The agent's store outlives a restart of its ranks, who have keys of their own.
    assert not served.check(["key"])
    assert diagnose("127.0.0.1", port, 1) == ""
