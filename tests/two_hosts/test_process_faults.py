"""Ranks, hosts and launchers of a run on two hosts are killed, stopped or asked to end.

After each fault no process and no port is left, one message of a host names rank, host and phase, and the run goes on
from a checkpoint no older than one interval, with the losses of a run in which nothing failed.
"""

from __future__ import annotations

import signal

import pytest

from tests.fork_server import ForkServer
from tests.two_hosts.job import BEATS_OFTEN, ENDS_SOON, PATIENCE, RANK_0, RANK_1, Job, Readings, rank_on

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("rank 1", {"node-1": RANK_1}),
        ("rank 0", {"node-2": RANK_0}),
        ("host", {"node-1": RANK_1}),
    ],
)
def test_a_rank_or_host_that_is_killed_ends_the_run_on_both_hosts(
    victim: str, said: dict[str, str], job: Job, fork_server: ForkServer, undisturbed: Readings
) -> None:
    job.start_and_train(*BEATS_OFTEN)
    if victim == "host":
        job.hosts[1].kill_all()
    else:
        rank_on(job.hosts[int(victim[-1])]).kill()
    job.check_fault(job.wait(PATIENCE), said)
    job.check_continuation(fork_server, undisturbed)


def test_a_rank_that_is_stopped_ends_the_run_on_both_hosts(
    job: Job, fork_server: ForkServer, undisturbed: Readings
) -> None:
    job.start_and_train(*ENDS_SOON)
    rank_on(job.hosts[1]).suspend()
    job.check_fault(job.wait(PATIENCE), {"node-1": RANK_1})
    job.check_continuation(fork_server, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_host_saves_and_ends_the_run_on_both(
    number: signal.Signals, job: Job, fork_server: ForkServer, undisturbed: Readings
) -> None:
    job.start_and_train()
    job.launchers[1].send_signal(number)
    assert job.wait(PATIENCE).codes == [128 + number, 128 + number]
    assert job.printed.count("stopped on request after saving a checkpoint") == 1, job.printed
    job.check_continuation(fork_server, undisturbed, lost=0)


@pytest.mark.parametrize("killed", ["launch_guard.py", "deepspeed.launcher.launch"])
def test_ranks_whose_launcher_was_killed_save_and_end(
    killed: str, job: Job, fork_server: ForkServer, undisturbed: Readings
) -> None:
    job.start_and_train()
    (launcher,) = [p for p in rank_on(job.hosts[1]).parents() if any(killed in word for word in p.cmdline())]
    launcher.kill()
    ending = job.wait(PATIENCE)
    assert ending.codes == [143, -signal.SIGKILL if killed == "launch_guard.py" else 143]
    assert job.printed.count("stopped on request after saving a checkpoint") == 1, job.printed
    job.check_continuation(fork_server, undisturbed, lost=0)
