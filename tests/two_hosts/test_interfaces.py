"""Hosts with several addresses, whose names are those of another network: nobody names an interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvd_scale.distributed.free_port import free_port
from tests.fork_server import ROOT
from tests.two_hosts.network import Host


def add_interface(host: Host, address: str) -> None:
    """Give a host an interface that leads nowhere."""
    host.run("ip", "link", "add", "other0", "type", "veth", "peer", "name", "other1")
    host.run("ip", "address", "add", f"{address}/24", "dev", "other0")
    for end in ("other0", "other1"):
        host.run("ip", "link", "set", end, "up")


def without_interfaces() -> dict[str, str]:
    """Environment variables, without the names of interfaces."""
    return {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}


def test_ranks_find_the_interface_that_leads_to_each_other(hosts: tuple[Host, Host]) -> None:
    for number, host in enumerate(hosts, start=1):
        add_interface(host, f"10.99.0.{number}")
    # By its name, gloo would take the address of a host that nobody else reaches.
    hosts[0].names.write_text("127.0.0.1 localhost\n10.99.0.1 node-1\n10.99.0.2 node-2\n")
    common = without_interfaces()
    common |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(free_port())}
    ranks = [
        host.start(
            *[sys.executable, "-m", "tests.two_hosts.sum_ranks"],
            cwd=ROOT,
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, host in enumerate(hosts)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
        assert f"3 over {Host.interface}" in output


@pytest.mark.slow
def test_torchrun_meets_at_the_name_of_a_host_that_knows_itself_as_127_0_1_1(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """So Debian writes /etc/hosts. The others know the name by its address."""
    first, other = hosts
    first.names = tmp_path / "debian"
    first.names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {first.name}\n{other.address} {other.name}\n")
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", first.name, "--master-port", "29500"]
    agents = [
        host.start(
            *[sys.executable, "-m", "mvd_scale.distributed.torchrun", *options, "--node-rank", str(node)],
            *["-m", "tests.two_hosts.sum_ranks"],
            cwd=ROOT,
            env=without_interfaces() | {"DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for node, host in enumerate(hosts)
    ]
    for agent in agents:
        output, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, output
        assert f"3 over {Host.interface}" in output


def test_a_host_whose_cable_is_unplugged_reaches_itself(hosts: tuple[Host, Host]) -> None:
    """`mvd-scale supervise` goes on with it alone."""
    hosts[1].link_down()
    words = "from mvd_scale.distributed.interface import Endpoint, choose_interface, own_interfaces"
    words += f"; print(choose_interface(Endpoint('node-1', 1, '{hosts[0].address}'), own_interfaces()))"
    assert hosts[0].run(sys.executable, "-c", words, cwd=ROOT) == f"{Host.interface}\n"
