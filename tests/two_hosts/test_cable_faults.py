"""The cable between the hosts of a run is cut, in one direction or both; or it is slow, which is no fault.

After each fault no process and no port is left, one message of a host names rank, host and phase, and the run goes on
from a checkpoint no older than one interval, with the losses of a run in which nothing failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.two_hosts.job import (
    ENDS_SOON,
    PATIENCE,
    RANK_0,
    RANK_1,
    SAVED_EVERY,
    Job,
    Readings,
    installed_copy,
    readings,
)
from tests.two_hosts.network import Host, connected_hosts
from tests.two_hosts.slow_cable import SlowCable

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def unplug(one: Host, other: Host) -> None:
    other.link_down()


def cut_one_way(one: Host, other: Host) -> None:
    other.stop_sending()


@pytest.mark.parametrize("cut", [unplug, cut_one_way])
def test_a_cut_cable_ends_the_run_on_both_hosts(
    cut: Callable[[Host, Host], None], job: Job, fork_server: ForkServer, undisturbed: Readings
) -> None:
    job.start_and_train(*ENDS_SOON)
    cut(*job.hosts)
    job.check_fault(job.wait(PATIENCE), {"node-1": RANK_1, "node-2": RANK_0})
    job.check_continuation(fork_server, undisturbed)


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
