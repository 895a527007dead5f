"""A run on two hosts under `mvd-scale supervise`, one supervisor on each host."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvd_scale.utils.events import read_events
from tests.two_hosts.job import readings
from tests.two_hosts.network import Host


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
