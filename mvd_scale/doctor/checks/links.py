"""All-reduce by NCCL or gloo of all ranks, and of pairs of hosts in rounds of pairs that measure at the same time.

In a round every host measures with one other, so all pairs of n hosts take n - 1 rounds (n if n is odd).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from mvd_scale.doctor.findings import Finding, TimeLimit, within
from mvd_scale.doctor.meeting import Meeting, NoAnswer

Pair = tuple[int, int]
"""Numbers of two hosts, the lower one first."""

_BYTES = {"cuda": (2**16, 2**20, 2**24, 2**28), "cpu": (2**16, 2**20, 2**24)}
"""Bytes of an all-reduce, one after the other until it takes long: with the last ones latency does not count."""

_LONG = 0.5
"""Seconds of an all-reduce that is long enough to be the only one."""

_SMALL = 2**10
"""Bytes of an all-reduce whose time is all latency."""

_REPEATS = 4
_PAIR_SECONDS, _ALL_SECONDS = 15.0, 60.0
"""Time limits of a pair, and of all ranks."""

PAIRS_SECONDS = 240.0
"""Time after which no further round of pairs begins."""

_SLOW = 0.5
"""Share of the median bandwidth of pairs below which one is slow."""

_kept: list[Any] = []
"""Process groups of measurements that failed: to release one whose connection hangs may hang, too."""


@dataclass(frozen=True)
class Speed:
    """Measured all-reduce."""

    gigabytes: float
    """Bus bandwidth in GB/s: bytes that each rank sends, by the time."""

    latency: float
    """Seconds of a small one."""

    def __str__(self) -> str:
        return f"{self.gigabytes:.3g} GB/s, {self.latency * 1e6:.0f} us"


@dataclass(frozen=True)
class PairsOrder:
    """Order of rank 0 for the measurement of pairs."""

    hosts: tuple[int, ...]
    """Ranks of the hosts of which pairs are measured."""

    rounds: int
    """Largest number of rounds."""


def rounds_of_pairs(count: int) -> list[list[Pair]]:
    """Schedule all pairs of `count` hosts, each once, so that a host is in one pair of a round at most.

    The circle method: one host stands still, and the others move on by one place from round to round.
    """
    seats = count + count % 2
    moving = seats - 1
    rounds = []
    for turn in range(moving):
        pairs = [(turn, moving)] + [((turn + k) % moving, (turn - k) % moving) for k in range(1, seats // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
    return rounds


def measure(store: Store, rank: int, size: int, device: str, seconds: float) -> Speed:
    """Reduce tensors among the ranks of a store, in a process group of their own.

    Args:
        store: store that only these ranks use.
        rank: number of this rank among them.
        size: number of ranks, two or more.
        device: `cuda` for NCCL, `cpu` for gloo.
        seconds: time limit.

    Raises:
        TimeLimit: it has not ended in time.
        RuntimeError: ranks cannot connect, or the sum is wrong.
    """
    stages = ["they do not connect"]
    try:
        return within(seconds, lambda: _measure(store, rank, size, device, timedelta(seconds=seconds), stages))
    except TimeLimit as limit:
        raise TimeLimit(f"{limit}: {stages[-1]}") from limit


def _measure(store: Store, rank: int, size: int, device: str, timeout: timedelta, stages: list[str]) -> Speed:
    group = _open_group(store, rank, size, device, timeout)
    _kept.append(group)
    stages.append("they connect, but a reduction of 4 bytes does not end")
    _reduce(group, torch.ones(1, device=device), size)
    latency = min(_reduce(group, torch.ones(_SMALL // 4, device=device), size) for _ in range(_REPEATS))
    for count in _BYTES[device]:
        stages.append(f"they connect, but a reduction of {count} bytes does not end")
        values = torch.ones(count // 4, device=device)
        # The ranks must agree whether to go on: by the mean of their times.
        mean = torch.full((1,), _reduce(group, values, size) / size, device=device)
        group.allreduce([mean]).wait()
        seconds = float(mean)
        if seconds > _LONG:
            break
    if seconds <= _LONG:
        seconds = statistics.median(_reduce(group, values.fill_(1), size) for _ in range(_REPEATS))
    _kept.remove(group)
    return Speed(2 * (size - 1) / size * count / seconds / 1e9, latency)


def _open_group(store: Store, rank: int, size: int, device: str, timeout: timedelta) -> Any:
    # Not `init_process_group`: there is one of it for a process, and one that hangs could not be taken down.
    if device == "cpu":
        return ProcessGroupGloo(store, rank, size, timeout)
    # A timeout is an exception here; by default it would end the process.
    os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_BLOCKING_WAIT": "1"}
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch.distributed.ProcessGroupNCCL(store, rank, size, options)


def _reduce(group: Any, values: torch.Tensor, size: int) -> float:
    """Reduce a tensor of ones, and return the seconds that it took.

    Raises:
        RuntimeError: the sum is wrong, or a rank does not answer.
    """
    started = time.perf_counter()
    group.allreduce([values]).wait()
    if values.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if float(values[-1]) != size:
        raise RuntimeError(f"the sum of {size} ones is {float(values[-1]):g}")
    return seconds


def measure_pairs(meeting: Meeting, order: PairsOrder, device: str) -> Iterator[Finding]:
    """Measure pairs of hosts in rounds. All hosts call it; rank 0 yields the findings.

    Args:
        meeting: meeting of the hosts.
        order: the order of rank 0.
        device: `cuda` for NCCL, `cpu` for gloo.

    Raises:
        NoAnswer: rank 0 does not answer.
    """
    labels = {host.rank: host.label for host in meeting.hosts}
    rounds, until = rounds_of_pairs(len(order.hosts)), time.monotonic() + PAIRS_SECONDS
    speeds: dict[Pair, Speed] = {}
    faults: dict[Pair, str] = {}
    for number, pairs in enumerate(rounds[: order.rounds]):
        ranks = [(order.hosts[a], order.hosts[b]) for a, b in pairs]
        ready, goes_on = meeting.begin(f"round {number + 1} of pairs", _PAIR_SECONDS + 5, time.monotonic() < until)
        if not goes_on:
            break
        for pair in ranks:
            if meeting.seat.rank in pair and set(pair) <= set(ready):
                meeting.put(f"pair/{pair}/{meeting.seat.rank}", _try_pair(meeting, pair, device))
        if meeting.leads:
            _collect_round(meeting, [pair for pair in ranks if set(pair) <= set(ready)], speeds, faults)
    if meeting.leads:
        yield from judge_pairs(speeds, faults, labels, len(list(combinations(order.hosts, 2))))


def _try_pair(meeting: Meeting, pair: Pair, device: str) -> dict[str, Any]:
    """Measure a pair that this host belongs to; figures, or the reason why it fails."""
    try:
        store = meeting.branch(f"group of {pair}")
        return vars(measure(store, pair.index(meeting.seat.rank), 2, device, _PAIR_SECONDS))
    except (RuntimeError, TimeLimit) as error:
        return {"fault": _first_line(error)}


def _collect_round(meeting: Meeting, pairs: Sequence[Pair], speeds: dict[Pair, Speed], faults: dict[Pair, str]) -> None:
    until = time.monotonic() + _PAIR_SECONDS + 5
    for pair in pairs:
        for rank in pair:
            try:
                result = meeting.get(f"pair/{pair}/{rank}", until - time.monotonic())
            except NoAnswer:
                result = {"fault": "no answer"}
            if "fault" in result:
                faults[pair] = result["fault"]
            elif pair not in faults:
                speeds[pair] = Speed(**result)
        if pair in faults:
            speeds.pop(pair, None)


def judge_pairs(
    speeds: dict[Pair, Speed], faults: dict[Pair, str], labels: dict[int, str], possible: int
) -> Iterator[Finding]:
    """Judge the measured pairs: those that fail, those that are slow, and all together.

    Args:
        speeds: measured pairs, by ranks.
        faults: reasons of pairs that fail, by ranks.
        labels: labels of hosts by rank.
        possible: number of all pairs.
    """
    name = "pairs of hosts"
    for pair, reason in faults.items():
        yield Finding(name, "fail", f"{_named(pair, labels)}: {reason}", _remedy(pair, faults, labels))
    if not speeds:
        return
    median = statistics.median(speed.gigabytes for speed in speeds.values())
    slowest = min(speeds, key=lambda pair: speeds[pair].gigabytes)
    for pair, speed in speeds.items():
        if speed.gigabytes < _SLOW * median:
            said = f"{_named(pair, labels)}: {speed}; the median is {median:.3g} GB/s"
            remedy = "see cable, port and route between them (`ethtool`, `ibstat`), and what else uses that link"
            yield Finding(name, "warning", said, remedy)
    said = (
        f"{len(speeds)} of {possible}: median {median:.3g} GB/s, slowest {_named(slowest, labels)}: {speeds[slowest]}"
    )
    figures = {"pairs": [{"hosts": [labels[a], labels[b]], **vars(speed)} for (a, b), speed in speeds.items()]}
    yield Finding(name, "ok", said, figures=figures)


def _remedy(pair: Pair, faults: dict[Pair, str], labels: dict[int, str]) -> str:
    common = [rank for rank in pair if len(faults) > 1 and all(rank in other for other in faults)]
    where = f"all failing pairs have {labels[common[0]]}: look there first. " if len(common) == 1 else ""
    return (
        f"{where}Open all TCP ports between the hosts (firewall, security group), and set GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME to the interface that all of them share"
    )


def measure_all(meeting: Meeting, ranks: Sequence[int], device: str) -> Finding:
    """Measure the all-reduce of all ranks. All of them call it.

    Args:
        meeting: meeting of the ranks.
        ranks: all ranks that take part.
        device: `cuda` for NCCL, `cpu` for gloo.
    """
    backend, name = ("NCCL" if device == "cuda" else "gloo"), "all-reduce"
    try:
        place = ranks.index(meeting.seat.rank)
        speed = measure(meeting.branch("group of all"), place, len(ranks), device, _ALL_SECONDS)
    except (RuntimeError, TimeLimit) as error:
        remedy = (
            "see the pairs that fail; if all work, see the log of NCCL_DEBUG=INFO, /dev/shm, and the direct access of "
            "the GPUs of each host"
        )
        return Finding(name, "fail", f"{backend}, {len(ranks)} ranks: {_first_line(error)}", remedy)
    return Finding(name, "ok", f"{backend}, {len(ranks)} ranks: {speed}", figures={"backend": backend, **vars(speed)})


def _named(pair: Pair, labels: dict[int, str]) -> str:
    return " - ".join(labels[rank] for rank in pair)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
