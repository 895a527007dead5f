"""Examination of all hosts of a job that a launcher has started.

On every host the first rank makes the checks, the others only take part in the all-reduce. Rank 0 leads, collects the
findings of all, and has the report. A host that is missing, dies or hangs is a finding, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

from mvd_scale.config.launcher import LaunchedRank, chosen_interfaces
from mvd_scale.doctor.checks.clocks import compare_clocks
from mvd_scale.doctor.checks.folder import share_folder
from mvd_scale.doctor.checks.links import PAIRS_SECONDS, PairsOrder, measure_all, measure_pairs
from mvd_scale.doctor.checks.network import names_of_others
from mvd_scale.doctor.findings import Finding, Group, HostCheck, TimeLimit, within
from mvd_scale.doctor.meeting import Meeting, NoAnswer, labelled, open_store, own_seat
from mvd_scale.doctor.one_host import Facts, compare_facts, facts_check, host_checks, make_checks
from mvd_scale.doctor.settings import Settings
from mvd_scale.utils.markdown import counted

_ALONE_SECONDS = 300.0
"""Longest time that the checks of a host alone take: where one of each group hangs."""

_JOB_SECONDS = 900.0
"""Longest time from the roster until the all-reduce of all ranks."""

_COLLECT_SECONDS = 20.0
"""Time in which all hosts send their findings at the end."""

PRESENCE = "presence"
"""Name of the check of which hosts and ranks came, which rank 0 alone makes."""

_HUNG = "see that host: what it waits for (`py-spy dump`), its disk, its network; then start again"


@dataclass(frozen=True)
class Phase:
    """Check that all hosts make together."""

    group: Group
    name: str

    make: Callable[[list[int]], Iterable[Finding]]
    """Function that makes it, given the ranks of the hosts that take part."""

    seconds: float

    of_job: bool = False
    """Whether what rank 0 finds is about all hosts."""


@dataclass(frozen=True)
class Examined:
    """Findings of rank 0, or of a host that does not reach it."""

    hosts: tuple[str, ...]
    """Labels of the hosts that came."""
    ranks: int
    """Number of ranks that came."""
    findings: list[Finding]


def examine_all(rank: LaunchedRank, settings: Settings) -> Examined | None:
    """Make all checks of this host and, together with the others, those of the job. Every rank calls it.

    Returns:
        findings, on rank 0 those of all hosts, on a host that does not reach rank 0 its own; None on others.
    """
    by_user = chosen_interfaces()  # before the store is opened, which chooses one for gloo
    try:
        meeting = within(settings.wait + 10, lambda: Meeting(open_store(rank, settings.wait), own_seat(rank)))
    except (NoAnswer, TimeLimit) as error:
        return None if rank.local_rank else _apart(rank, settings, by_user, str(error))
    if rank.local_rank:
        _join_all_reduce(meeting, settings.wait + _JOB_SECONDS)
        return None
    meeting.live()
    try:
        # Before the checks, which take each host another time.
        meeting.assemble(rank.world_size, settings.wait, list(settings.hosts))
    except NoAnswer as error:
        return _apart(rank, settings, by_user, str(error))
    facts: Facts = {}
    findings = make_checks([facts_check(facts), *host_checks(settings, meeting.seat.device, rank, by_user)], settings)
    try:
        findings = [*_on_host(meeting.seat.label, findings), *_meet(meeting, rank, settings)]
        meeting.put(f"findings/{rank.rank}", [list(map(asdict, findings)), facts])
    except NoAnswer as error:
        label = meeting.seat.label
        return Examined((label,), 1, _on_host(label, [*findings, _no_meeting(rank, str(error))]))
    return _collect(meeting, rank, settings) if meeting.leads else None


def _apart(rank: LaunchedRank, settings: Settings, by_user: Mapping[str, str], reason: str) -> Examined:
    """Make the checks of this host alone, since it does not reach the others."""
    (seat,) = labelled([own_seat(rank)], list(settings.hosts))
    findings = [_no_meeting(rank, reason), *make_checks(host_checks(settings, seat.device, rank, by_user), settings)]
    return Examined((seat.label,), 1, _on_host(seat.label, findings))


def _on_host(label: str, findings: Iterable[Finding]) -> list[Finding]:
    return [replace(finding, host=label) for finding in findings]


def _no_meeting(rank: LaunchedRank, reason: str) -> Finding:
    remedy = (
        f"see that rank 0 runs, that MASTER_ADDR is its address, and that port {rank.port} is open to the other hosts "
        f"(`nc -vz {rank.address} {rank.port}`); MASTER_PORT chooses another port"
    )
    said = f"rank {rank.rank} does not meet rank 0 at {rank.address}:{rank.port}: {reason}"
    return Finding("meeting", "fail", said, remedy, group="hosts")


def _join_all_reduce(meeting: Meeting, seconds: float) -> None:
    """Take part in the all-reduce, which begins within some seconds, as a rank that makes no checks."""
    try:
        ranks, device = meeting.poll("all-reduce", seconds)
    except NoAnswer:
        return  # rank 0 finds so itself
    if meeting.seat.rank in ranks:
        measure_all(meeting, ranks, device)


def _meet(meeting: Meeting, rank: LaunchedRank, settings: Settings) -> list[Finding]:
    """Make the checks of all hosts together, one phase after the other.

    Raises:
        NoAnswer: rank 0 does not answer.
    """
    findings: list[Finding] = []
    seconds = _ALONE_SECONDS
    for phase in _phases(meeting, rank, settings):
        ready, _ = meeting.begin(phase.name, seconds)
        check = HostCheck(phase.group, phase.name, partial(phase.make, ready), phase.seconds, _HUNG)
        made = make_checks([check], settings)
        findings += made if phase.of_job and meeting.leads else _on_host(meeting.seat.label, made)
        seconds = phase.seconds
    if meeting.leads and not meeting.has("all-reduce"):
        meeting.put("all-reduce", [[], meeting.device])  # the other ranks wait for it
    return findings


def _phases(meeting: Meeting, rank: LaunchedRank, settings: Settings) -> Iterator[Phase]:
    others = {host.label: host.name for host in meeting.hosts if host.rank != meeting.seat.rank}
    if len(meeting.hosts) > 1:
        yield Phase("network", "names", lambda ready: names_of_others(rank.address, others), 30)
        yield Phase("network", "clock", lambda ready: compare_clocks(meeting, ready), 60)
        yield Phase("folder", "shared folder", lambda ready: share_folder(meeting, ready, settings.folder), 90)
        yield Phase(
            "network", "pairs of hosts", lambda ready: _pairs(meeting, ready, settings), PAIRS_SECONDS + 60, True
        )
    yield Phase("network", "all-reduce", lambda ready: _all_reduce(meeting, ready), 90, True)


def _pairs(meeting: Meeting, ready: list[int], settings: Settings) -> Iterator[Finding]:
    known = {host.label: host.rank for host in meeting.hosts if host.rank in ready}
    unknown = [label for label in settings.between if label not in known]
    hosts = [known[label] for label in settings.between if label in known] or ready
    if unknown and meeting.leads:
        remedy = f"give some of {', '.join(known)}"
        yield Finding("pairs of hosts", "fail", f"--between names {', '.join(unknown)}, which did not come", remedy)
    yield from measure_pairs(meeting, PairsOrder(tuple(hosts), settings.rounds), meeting.device)


def _all_reduce(meeting: Meeting, ready: list[int]) -> Iterator[Finding]:
    if meeting.leads:
        present = {host.host for host in meeting.hosts if host.rank in ready}
        ranks = [seat.rank for seat in meeting.seats if seat.host in present]
        meeting.put("all-reduce", [ranks, meeting.device])
    ranks, device = meeting.get("all-reduce", 10)
    if len(ranks) < 2:
        yield Finding("all-reduce", "left out", "there are no two ranks")
        return
    finding = measure_all(meeting, ranks, device)
    if meeting.leads or finding.outcome == "fail":
        yield finding


def _collect(meeting: Meeting, rank: LaunchedRank, settings: Settings) -> Examined:
    """Collect the findings of all hosts, on rank 0."""
    findings: list[Finding] = list(_presence(meeting, rank, settings))
    facts: dict[str, Facts] = {}
    until = time.monotonic() + _COLLECT_SECONDS
    for host in meeting.hosts:
        try:
            theirs, facts[host.label] = meeting.get(f"findings/{host.rank}", until - time.monotonic())
        except NoAnswer:
            said = f"its findings do not come; the last phase that it was ready for: {meeting.phase_of(host.rank)!r}"
            findings.append(Finding("answer", "fail", said, _HUNG, host=host.label, group="hosts"))
        else:
            findings += [Finding(**finding) for finding in theirs]
    findings += compare_facts(facts)
    return Examined(tuple(host.label for host in meeting.hosts), len(meeting.seats), findings)


def _presence(meeting: Meeting, rank: LaunchedRank, settings: Settings) -> Iterator[Finding]:
    """Report which hosts and ranks came."""
    came = {seat.rank for seat in meeting.seats}
    missing = [number for number in range(rank.world_size) if number not in came]
    said = f"{counted(len(meeting.hosts), 'host')} with {counted(len(came), 'rank')}"
    devices = {seat.device for seat in meeting.seats}
    if len(devices) > 1:
        without = ", ".join(host.label for host in meeting.hosts if host.device == "cpu")
        yield Finding(
            "devices", "fail", f"no GPU on {without}, and GPUs on others", "see the GPUs of that host", group="hosts"
        )
    if not missing:
        yield Finding(PRESENCE, "ok", f"{said}: all that the launcher counts", group="hosts")
        return
    hosts = ", ".join(_names_of(missing, settings) or _numbers_of(meeting, rank)) or "hosts that the launcher knows"
    remedy = (
        f"see what the launcher says of it, and that it reaches {rank.address}:{rank.port} (`nc -vz {rank.address} "
        f"{rank.port}` there, while this runs); --wait gives it more time"
    )
    detail = f"{said} came; within {settings.wait:g} s there was nothing of ranks {_ranges(missing)}: {hosts}"
    yield Finding(PRESENCE, "fail", detail, remedy, {"missing ranks": missing}, group="hosts")


def _names_of(ranks: list[int], settings: Settings) -> list[str]:
    """Names of the hosts of ranks, as far as a hostfile tells them."""
    owners = [name for name, slots in settings.hosts.items() for _ in range(slots)]
    return list(dict.fromkeys(owners[rank] for rank in ranks if rank < len(owners)))


def _numbers_of(meeting: Meeting, rank: LaunchedRank) -> list[str]:
    """Hosts of which no rank came, by the launcher's numbers."""
    came = {seat.host for seat in meeting.seats}
    return [f"host number {number} of the launcher" for number in range(rank.hosts or 0) if str(number) not in came]


def _ranges(numbers: list[int]) -> str:
    """Format ascending numbers, such as `2-5, 8`."""
    firsts = [number for number in numbers if number - 1 not in numbers]
    lasts = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
