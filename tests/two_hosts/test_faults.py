"""What happens to ranks, hosts and cables of a run on two hosts: it ends in time, says why, and goes on as before.

After each fault no process and no port is left, one message of a host names rank, host and phase, and the run goes on
from a checkpoint no older than one interval, with the losses of a run in which nothing failed.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mvd_scale.errors import FAULT_CODE
from tests.fork_server import ForkServer
from tests.two_hosts.job import HANG_SECONDS, SAVED_EVERY, Job, Readings, installed_copy, readings
from tests.two_hosts.network import Host, connected_hosts
from tests.two_hosts.slow_cable import SlowCable

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

Hosts = tuple[Host, Host]


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


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (kill_rank, 15),
        (kill_rank_0, 15),
        (kill_host, 15),
        (stop_rank, HANG_SECONDS + 15),
        (unplug, HANG_SECONDS + 15),
        (cut_one_way, HANG_SECONDS + 15),
        (cut_the_other_way, HANG_SECONDS + 15),
    ],
)
def test_a_fault_ends_the_run_on_both_hosts(
    fault: Callable[[Host, Host, Job], None],
    seconds: float,
    job: Job,
    fork_server: ForkServer,
    undisturbed: Readings,
) -> None:
    one, other = job.hosts
    job.start_and_train()
    fault(one, other, job)
    ending = job.wait(seconds)
    assert FAULT_CODE in ending.codes
    assert any("rank 1 on node-2" in message and "phase" in message for message in ending.messages), job.printed
    check_continuation(job, fork_server, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_host_saves_and_ends_the_run_on_both(
    number: signal.Signals, job: Job, fork_server: ForkServer, undisturbed: Readings
) -> None:
    job.start_and_train()
    job.launchers[1].send_signal(number)
    ending = job.wait(15)
    assert ending.codes == [128 + number, 128 + number]
    assert job.printed.count("stopped on request after saving a checkpoint") == 1, job.printed
    check_continuation(job, fork_server, undisturbed, lost=0)


def test_ranks_whose_launcher_was_killed_save_and_end(job: Job, fork_server: ForkServer, undisturbed: Readings) -> None:
    job.start_and_train()
    job.launcher(job.hosts[1]).kill()
    ending = job.wait(15)
    assert 0 not in ending.codes
    assert "node-2" in job.printed
    check_continuation(job, fork_server, undisturbed, lost=0)


def test_a_slow_cable_is_no_fault(words: list[str], undisturbed: Readings, tmp_path: Path) -> None:
    with connected_hosts(tmp_path, SlowCable(0.1, loss=0.05)) as hosts:
        job = Job(hosts, installed_copy(tmp_path / "copy"), tmp_path / "run", words)
        job.start("--training.max_steps", "3")
        ending = job.wait(120)
    assert ending.codes == [0, 0]
    assert readings(job.run) == {step: undisturbed[step] for step in range(1, 4)}
