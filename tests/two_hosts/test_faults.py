"""What happens to ranks, hosts and cables of a run on two hosts: it ends in time, says why, and goes on as before.

After each fault no process and no port is left, one message of a host names rank, host and phase, and the run goes on
from a checkpoint no older than one interval, with the losses of a run in which nothing failed.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mvd_scale.errors import FAULT_CODE
from tests.fork_server import ForkServer
from tests.two_hosts.job import HANG_SECONDS, SAVED_EVERY, Job, Readings, installed_copy, readings
from tests.two_hosts.network import Host, connected_hosts
from tests.two_hosts.slow_cable import SlowCable

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


PATIENCE = HANG_SECONDS + 40
"""Seconds until the last process is gone after any fault, on a machine that is busy."""


def check_continuation(job: Job, fork_server: ForkServer, undisturbed: Readings, *, lost: int = SAVED_EVERY) -> None:
    """The run resumes, has lost at most so many steps, and its readings are those of the run that nobody touched."""
    reached = max(readings(job.run))
    assert reached - job.saved_steps()[-1] <= lost
    last = reached + 2
    assert last in undisturbed, "the run went on longer than the undisturbed one, so that they cannot be compared"
    ours = job.go_on(fork_server, last)
    assert ours == {step: undisturbed[step] for step in range(1, last + 1)}


def kill_rank(one: Host, other: Host, job: Job) -> None:
    job.rank(other).kill()


def kill_rank_0(one: Host, other: Host, job: Job) -> None:
    job.rank(one).kill()


def kill_host(one: Host, other: Host, job: Job) -> None:
    other.kill_all()


def stop_rank(one: Host, other: Host, job: Job) -> None:
    job.rank(other).suspend()


def unplug(one: Host, other: Host, job: Job) -> None:
    other.link_down()


def cut_one_way(one: Host, other: Host, job: Job) -> None:
    other.stop_sending()


def cut_the_other_way(one: Host, other: Host, job: Job) -> None:
    one.stop_sending()


RANK_0, RANK_1 = "rank 0 (host node-1, pid ", "rank 1 (host node-2, pid "


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (kill_rank, {"node-1": RANK_1}),
        (kill_rank_0, {"node-2": RANK_0}),
        (kill_host, {"node-1": RANK_1}),
        (stop_rank, {"node-1": RANK_1}),
        (unplug, {"node-1": RANK_1, "node-2": RANK_0}),
        (cut_one_way, {"node-1": RANK_1, "node-2": RANK_0}),
        (cut_the_other_way, {"node-1": RANK_1, "node-2": RANK_0}),
    ],
)
def test_a_fault_ends_the_run_on_both_hosts(
    fault: Callable[[Host, Host, Job], None],
    said: dict[str, str],
    job: Job,
    fork_server: ForkServer,
    undisturbed: Readings,
) -> None:
    job.start_and_train()
    fault(*job.hosts, job)
    ending = job.wait(PATIENCE)
    for host, code in zip(job.hosts, ending.codes, strict=True):
        messages = ending.messages[host.name]
        if host.name in said:
            assert code == FAULT_CODE, job.printed
            (message,) = messages
            assert said[host.name] in message
            assert re.search(r"'[a-z ]+' of step \d+", message), message
        else:
            assert code != 0
            assert not messages
    check_continuation(job, fork_server, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_host_saves_and_ends_the_run_on_both(
    number: signal.Signals, job: Job, fork_server: ForkServer, undisturbed: Readings
) -> None:
    job.start_and_train()
    job.launchers[1].send_signal(number)
    assert job.wait(PATIENCE).codes == [128 + number, 128 + number]
    assert job.printed.count("stopped on request after saving a checkpoint") == 1, job.printed
    check_continuation(job, fork_server, undisturbed, lost=0)


@pytest.mark.parametrize("killed", ["launch_guard.py", "deepspeed.launcher.launch"])
def test_ranks_whose_launcher_was_killed_save_and_end(
    killed: str, job: Job, fork_server: ForkServer, undisturbed: Readings
) -> None:
    job.start_and_train()
    (launcher,) = [p for p in job.rank(job.hosts[1]).parents() if any(killed in word for word in p.cmdline())]
    launcher.kill()
    ending = job.wait(PATIENCE)
    assert ending.codes == [143, -signal.SIGKILL if killed == "launch_guard.py" else 143]
    assert job.printed.count("stopped on request after saving a checkpoint") == 1, job.printed
    check_continuation(job, fork_server, undisturbed, lost=0)


def test_a_slow_cable_is_no_fault(words: list[str], undisturbed: Readings, tmp_path: Path) -> None:
    """200 ms and 5 % loss in each direction, for longer than the watchdog waits for a rank that is silent."""
    cable, limit = SlowCable(), 20
    with connected_hosts(tmp_path, cable) as hosts:
        job = Job(hosts, installed_copy(tmp_path / "copy"), tmp_path / "run", words)
        job.start("--training.max_steps", str(SAVED_EVERY), "--training.hang_minutes", str(limit / 60))
        job.wait_for(lambda: bool(readings(job.run)), 120)
        cable.seconds, cable.loss = 0.2, 0.05
        time.sleep(limit + 5)
        slow = max(readings(job.run))
        cable.seconds, cable.loss = 0.0, 0.0
        ending = job.wait(60)
    assert slow < SAVED_EVERY, "the cable was not slow"
    assert ending.codes == [0, 0]
    assert not any(ending.messages.values())
    assert readings(job.run) == {step: undisturbed[step] for step in range(1, SAVED_EVERY + 1)}
