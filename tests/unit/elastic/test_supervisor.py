"""Supervisors of toy jobs, which are killed, stopped and started again; the hosts are 127.0.0.1 and 127.0.0.2."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mvd_scale.distributed.free_port import free_port
from mvd_scale.elastic import supervisor
from mvd_scale.elastic.coordinator import Membership
from mvd_scale.elastic.meeting import JoinRefused, Site, join_coordinator
from mvd_scale.elastic.messages import Connection
from mvd_scale.elastic.supervisor import SupervisedJob, Supervisor

FIRST, SECOND = "127.0.0.1", "127.0.0.2"


class ToyJob:
    """Supervisors and ranks of a toy job in a folder."""

    def __init__(self, folder: Path, *hosts: str, slots: int = 2, batch: int = 8) -> None:
        self.folder = folder
        self.hosts = hosts
        self.slots, self.batch = slots, batch
        self.port = free_port()
        self.supervisors: list[subprocess.Popen[str]] = []

    def start(self, host: str) -> subprocess.Popen[str]:
        words = [str(self.folder), ",".join(self.hosts), host, str(self.port), str(self.slots), str(self.batch)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.elastic.toy_host", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.supervisors.append(process)
        return process

    def started(self) -> list[dict[str, Any]]:
        """Ranks that have been started, in the order of their starts."""
        file = self.folder / "started.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_ranks(self, count: int, but: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Wait until a world of so many ranks runs, other ones than `but`, and no further rank."""
        gone = [rank["pid"] for rank in but]

        def running() -> list[dict[str, Any]]:
            return [rank for rank in self.started() if is_running(rank["pid"]) and rank["pid"] not in gone]

        def complete() -> bool:
            ranks = running()
            return len(ranks) == count and all(rank["WORLD_SIZE"] == str(count) for rank in ranks)

        wait_until(complete, f"{count} ranks")
        return running()

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        output, _ = process.communicate(timeout=20)
        return process.returncode, output

    def lose(self, process: subprocess.Popen[str]) -> None:
        """Kill a supervisor and its ranks, as a host that loses its power."""
        ranks = psutil.Process(process.pid).children()
        process.kill()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        process.communicate()

    def restarts(self) -> list[str]:
        return (self.folder / "restarts.txt").read_text().splitlines()


def is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within 20 s"
        time.sleep(0.02)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Callable[..., ToyJob]]:
    made: list[ToyJob] = []

    def make(*hosts: str, **options: int) -> ToyJob:
        made.append(ToyJob(tmp_path, *hosts, **options))
        return made[-1]

    yield make
    for job in made:
        for process in job.supervisors:
            if process.poll() is None:
                job.lose(process)
        for rank in job.started():
            with suppress(ProcessLookupError):
                os.kill(rank["pid"], signal.SIGKILL)


def listening(process: int) -> list[str]:
    found = [connection for connection in psutil.net_connections("inet") if connection.pid == process]
    return [connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN]


def test_one_host_restarts_what_dies_and_listens_nowhere(toy: Callable[..., ToyJob]) -> None:
    job = toy("localhost", slots=3)
    supervisor = job.start("localhost")
    ranks = job.wait_for_ranks(2)  # 3 ranks do not divide the batch of 8
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"2"}
    assert sorted(rank["RANK"] for rank in ranks) == ["0", "1"]
    assert listening(supervisor.pid) == []
    os.kill(ranks[0]["pid"], signal.SIGKILL)
    job.wait_for_ranks(2, but=ranks)
    (job.folder / "finish").touch()
    assert job.end(supervisor)[0] == 0
    assert [line.split(maxsplit=3)[:3] for line in job.restarts()] == [["2", "2", "localhost"]]
    assert "exit code -9" in job.restarts()[0]


def test_invalid_input_ends_the_job_at_once(toy: Callable[..., ToyJob]) -> None:
    job = toy("localhost")
    supervisor = job.start("localhost")
    job.wait_for_ranks(2)
    (job.folder / "fail-1").write_text("2")
    code, output = job.end(supervisor)
    assert code == 2
    assert "invalid input" in output
    assert len(job.started()) == 2
    assert not any(is_running(rank["pid"]) for rank in job.started())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_a_supervisor_reaches_all_ranks(toy: Callable[..., ToyJob], number: int) -> None:
    job = toy(FIRST, SECOND)
    supervisors = [job.start(host) for host in job.hosts]
    ranks = job.wait_for_ranks(4)
    supervisors[1].send_signal(number)
    assert [job.end(supervisor)[0] for supervisor in supervisors] == [128 + number, 128 + number]
    assert not any(is_running(rank["pid"]) for rank in ranks)


@pytest.mark.slow
def test_a_host_goes_and_comes_back(toy: Callable[..., ToyJob]) -> None:
    job = toy(FIRST, SECOND)
    first, second = (job.start(host) for host in job.hosts)
    ranks = job.wait_for_ranks(4)
    assert {(rank["MASTER_ADDR"], rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) for rank in ranks} == {
        (FIRST, "4", "2")
    }
    assert sorted(rank["GROUP_RANK"] for rank in ranks) == ["0", "0", "1", "1"]
    assert listening(first.pid) == [FIRST]
    assert listening(second.pid) == []
    job.lose(second)
    alone = job.wait_for_ranks(2)
    second = job.start(SECOND)
    job.wait_for_ranks(4, but=alone)
    (job.folder / "finish").touch()
    assert [job.end(process)[0] for process in (first, second)] == [0, 0]
    *_, left, joined = job.restarts()
    assert left.split(maxsplit=3)[1:] == ["2", FIRST, f"lost {SECOND}"]
    assert joined.split(maxsplit=3)[1:] == ["4", f"{FIRST},{SECOND}", f"host joined: {SECOND}"]


@pytest.mark.slow
def test_another_host_takes_over_from_the_first_which_joins_it_later(toy: Callable[..., ToyJob]) -> None:
    job = toy(FIRST, SECOND)
    first, second = (job.start(host) for host in job.hosts)
    job.wait_for_ranks(4)
    job.lose(first)
    alone = job.wait_for_ranks(2)
    assert {rank["MASTER_ADDR"] for rank in alone} == {SECOND}
    assert listening(second.pid) == [SECOND]
    first = job.start(FIRST)
    together = job.wait_for_ranks(4, but=alone)
    assert {rank["MASTER_ADDR"] for rank in together} == {FIRST}
    assert listening(first.pid) == []
    (job.folder / "finish").touch()
    assert [job.end(process)[0] for process in (first, second)] == [0, 0]
    numbers = [int(line.split()[0]) for line in job.restarts()]
    assert numbers == sorted(set(numbers))


@pytest.mark.slow
def test_a_supervisor_that_hangs_is_a_lost_host(toy: Callable[..., ToyJob]) -> None:
    job = toy(FIRST, SECOND)
    first, second = (job.start(host) for host in job.hosts)
    together = job.wait_for_ranks(4)
    second.send_signal(signal.SIGSTOP)
    # The ranks of the second host run on, because they are toys.
    theirs = [rank for rank in together if rank["parent"] == second.pid]
    job.wait_for_ranks(2, but=theirs)
    assert first.poll() is None


def test_strangers_are_refused(toy: Callable[..., ToyJob]) -> None:
    job = toy(FIRST, SECOND)
    job.start(FIRST)
    wait_until(lambda: bool(job.started()), "a start without the second host")
    hello = {"kind": "hello", "host": SECOND, "slots": 2, "address": SECOND, "port": 1, "attempt": 0, "failures": []}
    site = Site(job.hosts, SECOND, SECOND, job.port)
    with pytest.raises(JoinRefused, match="another command or another hostfile") as refused:
        join_coordinator(site, FIRST, hello | {"job": "other"})
    assert refused.value.final
    with pytest.raises(JoinRefused, match=r"the hostfile of 127\.0\.0\.1 has no host node-7"):
        join_coordinator(site, FIRST, hello | {"job": "toy", "host": "node-7"})
    with pytest.raises(JoinRefused, match=r"127\.0\.0\.3 is no address of 127\.0\.0\.2") as refused:
        join_coordinator(Site(job.hosts, SECOND, "127.0.0.3", job.port), FIRST, hello | {"job": "toy"})
    assert not refused.value.final


def test_a_second_supervisor_of_a_host_is_refused(toy: Callable[..., ToyJob]) -> None:
    job = toy(FIRST, SECOND)
    for host in job.hosts:
        job.start(host)
    ranks = job.wait_for_ranks(4)
    code, output = job.end(job.start(SECOND))
    assert code != 0
    assert f"{SECOND} has a supervisor of this job already" in output
    assert all(is_running(rank["pid"]) for rank in ranks)


def test_a_stop_request_ends_the_search_for_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    job = SupervisedJob(["unused"], "toy", None, Membership((FIRST, SECOND)))  # type: ignore[arg-type]
    monkeypatch.setattr(supervisor, "find_coordinator", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(supervisor, "_SEARCH_SECONDS", 0)
    before = signal.getsignal(signal.SIGTERM)
    assert Supervisor(job, Site((FIRST, SECOND), SECOND, SECOND, 1), 2).run() == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_ranks_that_start_while_a_stop_request_is_under_way_get_its_signal() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    job = SupervisedJob(command, "toy", None, Membership((FIRST,)))  # type: ignore[arg-type]
    mine, theirs = socket.socketpair()
    host = Supervisor(job, Site((FIRST,), FIRST, FIRST, 0), 2)
    host._connection = Connection(mine)
    host._remember(signal.SIGTERM, None)
    host._forward_signals()
    place = {"ranks": 2, "first_rank": 0, "world_size": 2, "node": 0, "address": FIRST, "port": 1}
    host._obey({"kind": "start", "attempt": 1, **place})
    # The coordinator's answer to the stop request: the host that received the signal has passed it on.
    host._obey({"kind": "stop", "attempt": 1, "signal": signal.SIGTERM, "saves": True})
    ranks = host._ranks
    assert ranks is not None
    try:
        wait_until(lambda: not (ranks.poll() or ranks.is_running), "the end of the ranks")
    finally:
        ranks.kill()
    assert ranks.codes == [-signal.SIGTERM, -signal.SIGTERM]
    mine.close()
    theirs.close()
