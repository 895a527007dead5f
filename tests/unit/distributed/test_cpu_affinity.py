"""CPUs and number of threads of each rank of a machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvd_scale.distributed.cpu_affinity import (
    CpuBinding,
    CPUs,
    CpuShare,
    bind_to_cpus,
    cores_by_node,
    count_cpus,
    count_own_cpus,
    divide_cores,
    format_cpus,
    limit_to_quota,
    parse_cpus,
    partition_cpus,
    set_affinity,
)
from mvd_scale.distributed.exchange import StoreExchange


def machine(sizes: list[int], threads: int = 1) -> list[list[CPUs]]:
    """Nodes of some cores each, numbered as Linux does: the first hardware thread of every core, then the second."""
    cores = [frozenset(range(core, sum(sizes) * threads, sum(sizes))) for core in range(sum(sizes))]
    return [cores[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def write_system(root: Path, nodes: list[list[CPUs]]) -> Path:
    """`nodes` as the kernel tells of them."""
    for number, node in enumerate(nodes):
        (root / f"node/node{number}").mkdir(parents=True)
        (root / f"node/node{number}/cpulist").write_text(format_cpus(frozenset().union(*node)) + "\n")
        for core in node:
            for cpu in core:
                (root / f"cpu/cpu{cpu}/topology").mkdir(parents=True)
                (root / f"cpu/cpu{cpu}/topology/thread_siblings_list").write_text(format_cpus(core) + "\n")
    return root


def shares(sizes: list[int], ranks: int, threads: int = 1) -> list[str]:
    return [format_cpus(share.cpus) for share in divide_cores(machine(sizes, threads), ranks)]


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(sizes, st.integers(1, 20), st.integers(1, 2))
def test_ranks_divide_whole_cores_evenly_and_have_a_thread_for_each(sizes: list[int], ranks: int, threads: int) -> None:
    cores = [core for node in machine(sizes, threads) for core in node]
    ranks = min(ranks, len(cores))
    found = divide_cores(machine(sizes, threads), ranks)
    assert len(found) == ranks
    assert sum(len(share.cpus) for share in found) == sum(map(len, cores))
    assert frozenset().union(*(share.cpus for share in found)) == frozenset().union(*cores)
    held = [[core for core in cores if core <= share.cpus] for share in found]
    assert [core for share in held for core in share] == cores, "neighbours, in order"
    assert [len(share) for share in held] == [share.threads for share in found]
    assert max(map(len, held)) - min(map(len, held)) <= 1


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ([3, 3], 4, ["0-1", "2", "3-4", "5"]),  # taken in order, 2, 2, 1, 1 would straddle
        ([4, 3], 2, ["0-3", "4-6"]),
        ([3, 4], 2, ["0-2", "3-6"]),
        ([2, 2, 2, 2], 2, ["0-3", "4-7"]),
        ([4], 3, ["0-1", "2", "3"]),
    ],
)
def test_no_rank_straddles_nodes_where_it_need_not(sizes: list[int], ranks: int, expected: list[str]) -> None:
    assert shares(sizes, ranks) == expected


def test_hardware_threads_of_a_core_stay_together() -> None:
    first, second = frozenset({0, 1, 4, 5}), frozenset({2, 3, 6, 7})
    assert divide_cores(machine([2, 2], threads=2), 2) == [
        CpuShare(first, first, threads=2, budget=4),
        CpuShare(second, second, threads=2, budget=4),
    ]


def test_a_rank_runs_anywhere_on_the_nodes_of_its_share() -> None:
    homes = [format_cpus(share.numa_cpus) for share in divide_cores(machine([4, 4, 4]), 5)]
    assert shares([4, 4, 4], 5) == ["0-2", "3-5", "6-7", "8-9", "10-11"]
    assert homes == ["0-3", "0-7", "4-7", "8-11", "8-11"]


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ([2], 4, ["0", "0", "1", "1"]),
        ([2], 3, ["0", "0", "1"]),
        ([2, 2], 6, ["0", "0", "1", "2", "2", "3"]),
    ],
)
def test_more_ranks_than_cores_share_them(sizes: list[int], ranks: int, expected: list[str]) -> None:
    assert shares(sizes, ranks) == expected
    assert {share.threads for share in divide_cores(machine(sizes), ranks)} == {1}


def test_ranks_that_were_given_the_same_cpus_divide_them_and_others_keep_theirs(tmp_path: Path) -> None:
    system = write_system(tmp_path, machine([4, 4]))

    def out(*given: str) -> dict[int, str]:
        return {
            rank: f"{format_cpus(share.cpus)} x{share.threads}"
            for rank, share in partition_cpus(
                {10 + n: parse_cpus(cpus) for n, cpus in enumerate(given)}, system
            ).items()
        }

    assert out("0-7", "0-7") == {10: "0-3 x4", 11: "4-7 x4"}
    assert out("2-5") == {10: "2-5 x4"}
    assert out("0-5", "6-7") == {10: "0-5 x6", 11: "6-7 x2"}
    assert out("0-4", "3-7") == {10: "0-4 x5", 11: "3-7 x5"}
    assert out("4-7", "0-3", "0-3", "4-7") == {10: "4-5 x2", 11: "0-1 x2", 12: "2-3 x2", 13: "6-7 x2"}


SERVER = frozenset(range(224))
"""CPUs of a machine of two sockets with 56 cores of two hardware threads each."""

BOUND = [frozenset(range(28 * rank, 28 * (rank + 1))) for rank in range(8)]
"""CPUs to which a launcher has bound 8 ranks of it."""


@pytest.mark.parametrize(
    ("given", "quota", "count"),
    [
        pytest.param(BOUND, None, 28, id="8 ranks that the launcher has bound"),
        pytest.param([SERVER] * 8, None, 28, id="8 ranks that are not bound"),
        pytest.param([BOUND[0] | BOUND[1] | BOUND[2] | BOUND[3]] * 4, None, 28, id="4 ranks on their NUMA node"),
        pytest.param([SERVER] * 8, 64, 8, id="8 ranks, quota of 64 CPUs"),
        pytest.param(BOUND, 64, 8, id="8 bound ranks, quota of 64 CPUs"),
        pytest.param([SERVER], 4, 4, id="one rank, quota of 4 CPUs"),
        pytest.param([SERVER] * 8, 4, 1, id="8 ranks, quota of 4 CPUs"),
        pytest.param([SERVER], 0.5, 1, id="quota of half a CPU"),
        pytest.param([frozenset(range(8))], None, 8, id="one rank on a laptop"),
        pytest.param([frozenset(range(8))], 16, 8, id="quota that is more than there is"),
    ],
)
def test_cpus_that_a_rank_and_its_workers_keep_busy(
    given: list[CPUs], quota: float | None, count: int, tmp_path: Path
) -> None:
    shares = limit_to_quota(partition_cpus(dict(enumerate(given)), tmp_path), quota)
    assert {share.budget for share in shares.values()} == {count}
    assert {share.threads for share in shares.values()} == {count}, "every CPU is a core here"


def test_a_process_of_its_own_counts_its_cpus_and_its_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    for quota, count in ((None, 6), (4.0, 4), (2.5, 2), (0.5, 1), (64.0, 6)):
        monkeypatch.setattr("mvd_scale.distributed.cpu_affinity.cpu_quota", lambda quota=quota: quota)
        assert count_own_cpus() == count


def test_cores_and_nodes_as_the_kernel_tells_of_them(tmp_path: Path) -> None:
    nodes = machine([3, 12], threads=2)
    system = write_system(tmp_path, nodes)
    (system / "node/node2").mkdir()
    (system / "node/node2/cpulist").write_text("\n")  # memory alone
    assert cores_by_node(frozenset(range(30)), system) == nodes
    some = frozenset({1, 16, 2, 18, 4})
    assert cores_by_node(some, system) == [[frozenset({1, 16}), frozenset({2})], [frozenset({4}), frozenset({18})]]


def test_where_the_kernel_does_not_tell_every_cpu_is_a_core_of_one_node(tmp_path: Path) -> None:
    assert cores_by_node(frozenset({3, 1}), tmp_path) == [[frozenset({1}), frozenset({3})]]


@given(st.frozensets(st.integers(0, 300), min_size=1))
def test_cpus_are_written_as_the_kernel_does(cpus: CPUs) -> None:
    assert parse_cpus(format_cpus(cpus)) == cpus
    assert format_cpus(parse_cpus("0-3,64-67,9\n")) == "0-3,9,64-67"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_threads_and_children_stay_at_home_but_for_work_that_the_others_wait_for() -> None:
    def child() -> CPUs:
        command = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
        return frozenset(map(int, subprocess.check_output(command, text=True).split()))

    given = frozenset(os.sched_getaffinity(0))
    numa_cpus = frozenset({min(given)})
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        set_affinity(numa_cpus)
        assert child() == numa_cpus
        with CpuBinding(given, CpuShare(numa_cpus, numa_cpus, 1, 1)).lifted_to_all_cpus():
            assert child() == given
        assert {frozenset(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")} == {numa_cpus}
    finally:
        done.set()
        thread.join()
        set_affinity(given)


@pytest.fixture
def alone() -> Iterator[Callable[[], StoreExchange]]:
    """Opens an exchange as the only rank of a job."""
    before, store = torch.get_num_threads(), torch.distributed.HashStore()
    yield lambda: StoreExchange(store, 0, 1, timedelta(seconds=10), place="here")
    torch.set_num_threads(before)


def test_the_first_rank_tells_who_computes_where(
    alone: Callable[[], StoreExchange], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = frozenset(os.sched_getaffinity(0))
    with caplog.at_level(logging.INFO, "mvd_scale"):
        bind_to_cpus(alone(), threads=7)
    assert caplog.messages == [f"CPUs by rank: 0: {format_cpus(given)} (7 threads)"]
    assert torch.get_num_threads() == 7
    monkeypatch.setattr("mvd_scale.distributed.cpu_affinity.cpu_quota", lambda: None)
    bind_to_cpus(alone(), threads=None)
    assert torch.get_num_threads() == sum(map(len, cores_by_node(given)))


def test_a_rank_that_is_not_bound_counts_its_share(
    alone: Callable[[], StoreExchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = frozenset(os.sched_getaffinity(0))
    monkeypatch.setattr("mvd_scale.distributed.cpu_affinity.cpu_quota", lambda: None)
    assert count_cpus(alone()) == len(given)
    monkeypatch.setattr("mvd_scale.distributed.cpu_affinity.cpu_quota", lambda: 1.0)
    assert count_cpus(alone()) == 1
    assert frozenset(os.sched_getaffinity(0)) == given
