"""`mvd-scale doctor` on two hosts: it compares them, and ends with a report on both where their cable is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import ROOT
from tests.two_hosts.network import Host

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PORT = 29501


class Doctors:
    """The doctor on each of two hosts, as a launcher would start it."""

    def __init__(self, hosts: tuple[Host, Host], scratch: Path, *words: str) -> None:
        command = [sys.executable, "-m", "mvd_scale", "doctor", "--json", "--folder", str(scratch), *words]
        job = {"WORLD_SIZE": "2", "CROSS_SIZE": "2", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        job |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT)}
        self.processes = [
            host.start(
                *command,
                cwd=ROOT,
                env={**os.environ, **job, "RANK": str(number), "CROSS_RANK": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for number, host in enumerate(hosts)
        ]

    def findings(self, number: int, seconds: float) -> tuple[int, dict[str, list[dict[str, Any]]]]:
        """Exit code of a host, and the findings that it prints, by check."""
        printed, _ = self.processes[number].communicate(timeout=seconds)
        found: dict[str, list[dict[str, Any]]] = {}
        for line in printed.splitlines():
            for finding in json.loads(line)["findings"]:
                found.setdefault(finding["check"], []).append(finding)
        return self.processes[number].returncode, found


def test_two_hosts_are_compared_and_rank_0_reports(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    doctors = Doctors(hosts, shared, "--only", "network", "--only", "folder", "--only", "versions", "--only", "hosts")
    code, found = doctors.findings(0, 120)
    assert doctors.findings(1, 60) == (0, {})
    assert code == 0, found
    assert found["presence"][0]["detail"] == "2 hosts with 2 ranks: all that the launcher counts"
    for check in ("interfaces", "clock", "shared folder"):
        assert [finding["host"] for finding in found[check]] == ["node-1", "node-2"]
    assert "eth0 (10.77.0.2" in found["interfaces"][1]["detail"]
    for check in ("torch", "rename", "pairs of hosts", "all-reduce"):
        assert {finding["outcome"] for finding in found[check]} == {"ok"}
    assert list(shared.iterdir()) == []


@pytest.mark.extended
def test_a_cable_that_is_cut_meanwhile_is_a_red_line_on_both_hosts(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    doctors = Doctors(hosts, tmp_path, "--only", "network", "--only", "hosts", "--wait", "15")
    deadline = time.monotonic() + 60
    while PORT not in hosts[0].listening_ports():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    hosts[1].link_down()
    for number in (0, 1):
        code, found = doctors.findings(number, 150)
        assert code == 1
        faults = [finding for findings in found.values() for finding in findings if finding["outcome"] == "fail"]
        assert any(finding["group"] == "hosts" for finding in faults)
        assert all(finding["remedy"] for finding in faults)
