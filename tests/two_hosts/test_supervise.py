"""A run under `mvd-scale supervise` that loses a host, goes on, and gets it back."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fork_server import ROOT, ForkServer
from tests.two_hosts.job import readings, train
from tests.two_hosts.network import Host
from tests.two_hosts.supervised_run import SupervisedRun
from tests.unit.elastic.test_supervisor import is_running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TOLERANCE = 2e-5
"""Relative difference of losses and gradient norms on other numbers of ranks, whose sums have another order."""


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
