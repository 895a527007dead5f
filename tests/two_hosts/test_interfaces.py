"""Hosts with several addresses, whose names are those of another network: nobody names an interface."""

from __future__ import annotations

import os
import subprocess
import sys

from mvd_scale.distributed.free_port import free_port
from tests.fork_server import ROOT
from tests.two_hosts.network import Host


def add_interface(host: Host, address: str) -> None:
    """Give a host an interface that leads nowhere."""
    host.run("ip", "link", "add", "other0", "type", "veth", "peer", "name", "other1")
    host.run("ip", "address", "add", f"{address}/24", "dev", "other0")
    for end in ("other0", "other1"):
        host.run("ip", "link", "set", end, "up")


def test_ranks_find_the_interface_that_leads_to_each_other(hosts: tuple[Host, Host]) -> None:
    for number, host in enumerate(hosts, start=1):
        add_interface(host, f"10.99.0.{number}")
    # By its name, gloo would take the address of a host that nobody else reaches.
    hosts[0].names.write_text("127.0.0.1 localhost\n10.99.0.1 node-1\n10.99.0.2 node-2\n")
    common = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
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
