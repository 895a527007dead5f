"""Pairs of hosts are measured in few rounds, and judged against each other."""

from __future__ import annotations

import math
import time
from itertools import combinations

import pytest
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, ProcessGroupGloo, Store

from mvd_scale.doctor.checks import links
from mvd_scale.doctor.checks.links import (
    PairsOrder,
    Speed,
    judge_pairs,
    measure,
    measure_all,
    measure_pairs,
    rounds_of_pairs,
)
from mvd_scale.doctor.findings import Finding, TimeLimit
from mvd_scale.doctor.meeting import Meeting
from tests.unit.doctor.conftest import Meet, seat

LABELS = {number: f"n{number}" for number in range(8)}


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_BYTES", {"cpu": (2**16,)})


@pytest.mark.parametrize("count", range(2, 20))
def test_rounds_have_every_pair_once_and_no_host_twice(count: int) -> None:
    rounds = rounds_of_pairs(count)
    assert len(rounds) == count - 1 + count % 2
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(count), 2))
    for pairs in rounds:
        hosts = [host for pair in pairs for host in pair]
        assert len(set(hosts)) == len(hosts)


def test_a_single_host_has_no_pairs() -> None:
    assert [pair for pairs in rounds_of_pairs(1) for pair in pairs] == []


def test_two_ranks_are_measured(meet: Meet) -> None:
    first, second = meet(2, lambda meeting: measure_all(meeting, [0, 1], "cpu"))
    assert first.outcome == second.outcome == "ok"
    assert first.figures["backend"] == "gloo"
    assert first.figures["gigabytes"] > 0
    assert 0 < first.figures["latency"] < 1


def test_a_rank_that_does_not_come_ends_by_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_ALL_SECONDS", 0.5)
    started = time.monotonic()
    finding = measure_all(Meeting(HashStore(), seat(0)), [0, 1], "cpu")
    assert time.monotonic() - started < 5
    assert finding.outcome == "fail"
    assert finding.detail.startswith("gloo, 2 ranks: ")
    assert "connect" in finding.detail or "Wait timeout" in finding.detail
    assert "NCCL_DEBUG=INFO" in finding.remedy


def test_a_slow_link_is_measured_by_small_messages(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = links._reduce

    def reduce(group: object, values: Tensor, size: int) -> float:
        sizes.append(values.numel() * 4)
        return whole(group, values, size) + values.numel() * 4 / 2**16

    monkeypatch.setattr(links, "_BYTES", {"cpu": (2**10, 2**16, 2**20)})
    monkeypatch.setattr(links, "_reduce", reduce)
    first, second = meet(2, lambda meeting: measure_all(meeting, [0, 1], "cpu"))
    assert first.outcome == second.outcome == "ok"
    assert max(sizes) == 2**16
    assert sizes.count(2**16) == 2
    assert first.figures["gigabytes"] == pytest.approx(2**16 / 1e9, rel=0.2)


def test_a_reduction_that_does_not_end_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_open_group", lambda *arguments: None)
    monkeypatch.setattr(links, "_reduce", lambda *arguments: time.sleep(1))
    with pytest.raises(TimeLimit, match=r"within 0\.1 s: they connect, but a reduction of 4 bytes does not end"):
        measure(HashStore(), 0, 2, "cpu", 0.1)


def test_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # One rank alone sums one.
    monkeypatch.setattr(links, "ProcessGroupGloo", lambda store, rank, size, timeout: ProcessGroupGloo(store, 0, 1))
    with pytest.raises(RuntimeError, match="the sum of 2 ones is 1"):
        measure(HashStore(), 0, 2, "cpu", 5)


def pairs_of(meet: Meet, count: int, rounds: int = 32, hosts: tuple[int, ...] | None = None) -> list[list[Finding]]:
    order = PairsOrder(tuple(range(count)) if hosts is None else hosts, rounds)
    return meet(count, lambda meeting: list(measure_pairs(meeting, order, "cpu")))


def test_all_pairs_are_measured_by_rank_0(meet: Meet) -> None:
    first, *others = pairs_of(meet, 4)
    assert others == [[], [], []]
    summary = first[-1]
    assert summary.detail.startswith("6 of 6: median ")
    assert {tuple(pair["hosts"]) for pair in summary.figures["pairs"]} == set(
        combinations(["node-0", "node-1", "node-2", "node-3"], 2)
    )


def test_rounds_are_capped_and_hosts_chosen(meet: Meet) -> None:
    assert pairs_of(meet, 4, rounds=1)[0][-1].detail.startswith("2 of 6: ")
    assert pairs_of(meet, 4, rounds=0)[0] == []
    (chosen,) = pairs_of(meet, 4, hosts=(1, 3))[0]
    assert [pair["hosts"] for pair in chosen.figures["pairs"]] == [["node-1", "node-3"]]


def test_a_pair_that_cannot_connect(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = links.measure

    class Named(PrefixStore):
        def __init__(self, prefix: str, store: Store) -> None:
            super().__init__(prefix, store)
            self.prefix = prefix

    def measure_but(store: Named, rank: int, size: int, device: str, seconds: float) -> Speed:
        if "(1, 2)" in store.prefix:
            raise RuntimeError("connect timeout\nmore")
        return whole(store, rank, size, device, seconds)

    monkeypatch.setattr("mvd_scale.doctor.meeting.PrefixStore", Named)
    monkeypatch.setattr(links, "measure", measure_but)
    fault, *_, summary = pairs_of(meet, 3)[0]
    assert (fault.outcome, fault.detail) == ("fail", "node-1 - node-2: connect timeout")
    assert "GLOO_SOCKET_IFNAME" in fault.remedy
    assert summary.detail.startswith("2 of 3: ")


def speeds(**by_pair: float) -> dict[tuple[int, int], Speed]:
    return {(int(pair[1]), int(pair[2])): Speed(value, 1e-4) for pair, value in by_pair.items()}


def test_a_slow_pair_is_named() -> None:
    slow, summary = judge_pairs(speeds(p01=10.0, p02=9.0, p12=3.0), {}, LABELS, 3)
    assert slow.outcome == "warning"
    assert slow.detail == "n1 - n2: 3 GB/s, 100 us; the median is 9 GB/s"
    assert summary.outcome == "ok"
    assert "slowest n1 - n2" in summary.detail


def test_the_host_that_all_failing_pairs_share_is_named() -> None:
    faults = {(0, 2): "timeout", (1, 2): "timeout", (2, 3): "timeout"}
    findings = list(judge_pairs({}, faults, LABELS, 6))
    assert [finding.outcome for finding in findings] == ["fail"] * 3
    assert all(finding.remedy.startswith("all failing pairs have n2: look there first.") for finding in findings)


def test_bandwidth_counts_what_each_rank_sends() -> None:
    assert math.isclose(Speed(1.5, 2e-4).gigabytes, 1.5)
    assert str(Speed(1.5, 2e-4)) == "1.5 GB/s, 200 us"
