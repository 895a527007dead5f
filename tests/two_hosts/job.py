"""A run on two hosts, started as a user starts it without ssh; and the same run without launcher and network."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from mvd_scale.errors import FAULT_CODE
from mvd_scale.utils.io import read_metrics
from tests.fork_server import ROOT, ForkServer
from tests.two_hosts.network import Host, wait_until_empty

SAVED_EVERY = 20
"""Optimizer steps from one checkpoint to the next."""

HANG_SECONDS = 10
"""Limit of the watchdog where a test waits for it; longer than a busy machine lets a rank wait for its turn."""

ENDS_SOON = ["--training.hang_minutes", str(HANG_SECONDS / 60)]
"""Words of a command with this limit."""

BEATS_OFTEN = ["--training.hang_minutes", "0.5"]
"""Words of a command whose ranks send a heartbeat every 0.5 s, so that one comes between the start and the fault."""

PATIENCE = 60
"""Seconds until the last process is gone after any fault, on a machine that is busy."""

RANK_0, RANK_1 = "rank 0 (host node-1, pid ", "rank 1 (host node-2, pid "
"""How messages name the ranks of the two hosts."""

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
        common |= {"OMP_NUM_THREADS": "1"}
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

    def start_and_train(self, *words: str) -> None:
        """Start, and wait until the first checkpoint is complete, which is long before the next one."""
        self.start(*words)
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

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return sorted(int(p.name[5:]) for p in (self.run / "checkpoints").glob("step_*") if p.name[5:].isdecimal())

    def check_fault(self, ending: Ending, said: Mapping[str, str]) -> None:
        """Check that hosts ended with one message each that names a rank, its host and its phase, or with none.

        Args:
            ending: how the job ended.
            said: beginning of the message by the name of the host; hosts that are left out print none.
        """
        for host, code in zip(self.hosts, ending.codes, strict=True):
            messages = ending.messages[host.name]
            if host.name in said:
                assert code == FAULT_CODE, self.printed
                (message,) = messages
                assert said[host.name] in message
                assert re.search(r"'[a-z ]+' of step \d+|'room for step \d+'", message), message
            else:
                assert code != 0
                assert not messages, self.printed

    def check_continuation(self, fork_server: ForkServer, undisturbed: Readings, *, lost: int = SAVED_EVERY) -> None:
        """Resume, without launcher and network, and check that the readings are those of a run in which nothing failed.

        Args:
            fork_server: starter of the ranks.
            undisturbed: readings of that run.
            lost: largest number of steps after the newest checkpoint, which the run repeats.
        """
        reached = max(readings(self.run))
        assert reached - self.saved_steps()[-1] <= lost
        last = reached + 2
        assert last in undisturbed, "the run went on longer than the undisturbed one, so that they cannot be compared"
        # The lease of a host that does not answer ends after 30 s.
        (self.run / "lease.json").unlink(missing_ok=True)
        assert "resumed from" in train(fork_server, self.words, last)
        assert readings(self.run) == {step: undisturbed[step] for step in range(1, last + 1)}

    def _log(self, host: Host) -> Path:
        return self.root / f"{host.name}.log"


def rank_on(host: Host) -> psutil.Process:
    """The rank on a host that has one."""
    (found,) = [p for p in host.processes() if "RANK" in p.environ() and "RANK" not in p.parent().environ()]
    return found


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
