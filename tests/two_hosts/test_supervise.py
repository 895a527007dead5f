"""A run under `mvd-scale supervise` that loses a host, goes on, and gets it back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.utils.events import read_events
from tests.fork_server import ROOT, ForkServer
from tests.two_hosts.job import readings, train
from tests.two_hosts.network import Host
from tests.unit.elastic.test_supervisor import is_running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TOLERANCE = 2e-5
"""Relative difference of losses and gradient norms on other numbers of ranks, whose sums have another order."""


class SupervisedRun:
    """Run with one rank on each of two hosts, each of which has a supervisor."""

    def __init__(self, hosts: tuple[Host, Host], words: list[str], scratch: Path) -> None:
        self.hosts = hosts
        self.folder = scratch / "run"
        self.words = [*words, "--run.folder", str(self.folder)]
        self.hostfile = scratch / "hostfile"
        self.hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
        self.log = scratch / "log"
        self.supervisors: dict[str, subprocess.Popen[str]] = {}

    def start(self, host: Host) -> None:
        """Start the supervisor of a host, which is told of no network interface."""
        options = ["--hostfile", str(self.hostfile), "--join-seconds", "4", "--dead-seconds", "5"]
        options += ["--backoff-seconds", "1"]
        env = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
        with self.log.open("a") as log:
            self.supervisors[host.name] = host.start(
                *[sys.executable, "-m", "mvd_scale", "supervise", *options, "--", *self.words],
                env=env | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not met after {seconds} s:\n{self.log.read_text()[-6000:]}"
            time.sleep(0.1)

    def wait_for_steps(self, count: int = 30) -> None:
        """Wait until so many further optimizer steps are done, which include a checkpoint."""
        before = self.step
        self.wait_for(lambda: self.step >= before + count)

    @property
    def step(self) -> int:
        return max(readings(self.folder), default=0)

    def restarts(self) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder / "events.jsonl") if event["event"] == "restart"]

    def listening_addresses(self) -> set[str]:
        """Addresses at which processes of the hosts listen."""
        return {
            line.split()[3].rpartition(":")[0] for host in self.hosts for line in host.run("ss", "-Hltn").splitlines()
        }


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(1, id="second host"),
        pytest.param(0, id="first host, which coordinates", marks=pytest.mark.extended),
    ],
)
@pytest.mark.timeout(900)
def test_a_run_loses_a_host_goes_on_and_gets_it_back(
    lost: int, hosts: tuple[Host, Host], words: list[str], fork_server: ForkServer, tmp_path: Path
) -> None:
    # Each rank draws its own drop paths, so that other ranks are another run.
    words = [*words, "--model.drop_path", "0"]
    run = SupervisedRun(hosts, words, tmp_path)
    for host in hosts:
        run.start(host)
    run.wait_for_steps()
    assert run.listening_addresses() == {host.address for host in hosts}

    hosts[lost].kill_all()
    run.wait_for(lambda: len(run.restarts()) == 1)
    run.wait_for_steps()
    run.start(hosts[lost])
    run.wait_for(lambda: len(run.restarts()) == 2)
    run.wait_for_steps()

    left = hosts[1 - lost].name
    assert [(event["hosts"], event["ranks"]) for event in run.restarts()] == [([left], 1), (["node-1", "node-2"], 2)]
    run.supervisors["node-2"].send_signal(signal.SIGTERM)
    assert [run.supervisors[host.name].wait(120) for host in hosts] == [143, 143]
    assert not [process for host in hosts for process in host.processes()]

    disturbed = readings(run.folder)
    undisturbed = tmp_path / "undisturbed"
    train(fork_server, [*words, "--run.folder", str(undisturbed)], max(disturbed))
    expected = readings(undisturbed)
    assert disturbed.keys() == expected.keys()
    for step, values in disturbed.items():
        assert values == pytest.approx(expected[step], rel=TOLERANCE), f"step {step}"


@pytest.mark.extended
def test_of_two_sides_of_a_cut_link_one_goes_on_and_takes_the_other_in_again(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    toy = [str(tmp_path), ",".join(host.name for host in hosts)]
    supervisors = [
        host.start(sys.executable, "-m", "tests.unit.elastic.toy_host", *toy, host.name, "29400", "2", "8", cwd=ROOT)
        for host in hosts
    ]
    wait_until(lambda: worlds(tmp_path) == {"4": 4}, "all ranks")
    hosts[1].link_down()
    wait_until(lambda: worlds(tmp_path) == {"2": 2}, "ranks of one host")
    # The other one would have started within this time.
    time.sleep(8)
    assert worlds(tmp_path) == {"2": 2}
    assert [process.poll() for process in supervisors] == [None, None]
    hosts[1].link_up()
    wait_until(lambda: worlds(tmp_path) == {"4": 4}, "all ranks again")
    (tmp_path / "finish").touch()
    assert [process.wait(20) for process in supervisors] == [0, 0]


def worlds(folder: Path) -> dict[str, int]:
    """Number of running toy ranks by the number of ranks that their world has."""
    lines = (folder / "started.jsonl").read_text().splitlines() if (folder / "started.jsonl").exists() else []
    ranks = [json.loads(line) for line in lines]
    return dict(Counter(rank["WORLD_SIZE"] for rank in ranks if is_running(rank["pid"])))
