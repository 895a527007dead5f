"""A run on two hosts, started as a user starts it without ssh; and the same run without launcher and network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from mvd_scale.utils.io import read_metrics
from tests.fork_server import ROOT, ForkServer
from tests.two_hosts.network import Host, wait_until_empty

SAVED_EVERY = 20
"""Optimizer steps from one checkpoint to the next."""

HANG_SECONDS = 6
"""Time after which a hung run is ended."""

Readings = dict[int, tuple[float, float, float]]
"""Loss, norm of the gradients and learning rate by optimizer step."""


@dataclass(frozen=True)
class Ending:
    """How a job ended."""

    codes: list[int]
    """Exit code of the launcher of each host, negative if a signal ended it."""

    messages: dict[str, list[str]]
    """Errors that the program printed, by the name of the host."""

    seconds: float
    """Time until the last process was gone."""


class Job:
    """A run with one rank on each of two hosts.

    Args:
        hosts: hosts of the job, in the order of their ranks.
        root: folder with `launch/` and an environment that is installed.
        run: folder of the run, which the hosts share.
        words: words of the command but for the run folder.
    """

    def __init__(self, hosts: tuple[Host, Host], root: Path, run: Path, words: list[str]) -> None:
        self.hosts = hosts
        self.root = root
        self.run = run
        self.words = [*words, "--run.folder", str(run)]
        self.launchers: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> None:
        """Start `launch/multi_node.sh` on each host."""
        hostfile = self.root / "hostfile"
        hostfile.write_text("".join(f"{host.name} slots=1\n" for host in self.hosts))
        common = {"HOSTFILE": str(hostfile), "MASTER_ADDR": self.hosts[0].address, "DS_ACCELERATOR": "cpu"}
        common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": Host.interface}
        self.launchers = []
        for number, host in enumerate(self.hosts):
            command = [self.root / "launch" / "multi_node.sh", *self.words, *words]
            env = {**os.environ, **common, "NODE_RANK": str(number)}
            with self._log(host).open("w") as log:
                process = host.start(*command, cwd=self.root, env=env, stdout=log, stderr=subprocess.STDOUT)
            self.launchers.append(process)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until a condition is met, while all launchers live."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(process.poll() is None for process in self.launchers), self.printed
            assert time.monotonic() < deadline, f"not met after {seconds} s:\n{self.printed}"
            time.sleep(0.05)

    def start_and_train(self) -> None:
        """Start, and wait until the first checkpoint is complete, which is long before the next one."""
        self.start()
        self.wait_for(lambda: bool(self.saved_steps()), 120)

    def wait(self, seconds: float) -> Ending:
        """Wait until every process is gone.

        Raises:
            AssertionError: some are left after these seconds, or hold a port; or an error is a traceback.
        """
        started = time.monotonic()
        try:
            codes = [process.wait(max(started + seconds - time.monotonic(), 0)) for process in self.launchers]
            wait_until_empty(self.hosts, started + seconds - time.monotonic())
        except (subprocess.TimeoutExpired, AssertionError) as error:
            raise AssertionError(f"{error}\n{self.printed}") from None
        ended = time.monotonic() - started
        assert not any(host.listening_ports() for host in self.hosts)
        assert "Traceback" not in self.printed, self.printed
        printed = {host.name: self.output(host).splitlines() for host in self.hosts}
        said = {host: [line for line in lines if line.startswith("mvd-scale: ")] for host, lines in printed.items()}
        return Ending(codes, said, ended)

    def output(self, host: Host) -> str:
        """Everything that a host printed since the last start."""
        return self._log(host).read_text()

    @property
    def printed(self) -> str:
        """Everything that the hosts printed since the last start, for messages."""
        return "\n".join(f"--- {host.name}\n{self.output(host)}" for host in self.hosts)

    def rank(self, host: Host) -> psutil.Process:
        """The rank on a host."""
        (found,) = [p for p in host.processes() if "RANK" in p.environ() and "RANK" not in p.parent().environ()]
        return found

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return sorted(int(p.name[5:]) for p in (self.run / "checkpoints").glob("step_*") if p.name[5:].isdecimal())

    def go_on(self, fork_server: ForkServer, steps: int) -> Readings:
        """Resume from the newest checkpoint, without launcher and network, and return the readings of the whole run."""
        output = train(fork_server, self.words, steps)
        assert "resumed from" in output
        return readings(self.run)

    def _log(self, host: Host) -> Path:
        return self.root / f"{host.name}.log"


def readings(run: Path) -> Readings:
    """Readings of a run, as far as it is."""
    metrics = run / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in rows}


def train(fork_server: ForkServer, words: list[str], steps: int) -> str:
    """Train until so many steps are done, and return the output; the ranks are those of two hosts with one each."""
    words = [*words, "--training.max_steps", str(steps)]
    code, output = fork_server.run("mvd_scale", *words, ranks=[1, 1], env={"OMP_NUM_THREADS": "1"})
    assert code == 0, output
    return output


def installed_copy(root: Path) -> Path:
    """Make a folder in which the launch scripts find an environment that is installed: the one of this process."""
    venv = root / ".venv"
    venv.mkdir(parents=True)
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "stamp":
            venv.joinpath(entry.name).symlink_to(entry)
    for name in ("launch", "mvd_scale", "pyproject.toml"):
        root.joinpath(name).symlink_to(ROOT / name)
    wanted = hashlib.sha256(f"{root}\n".encode() + (ROOT / "pyproject.toml").read_bytes())
    venv.joinpath("stamp").write_text(f"{wanted.hexdigest()}  -\n")
    return root
