"""Starts processes of a job that need not import anything: each is forked from one that has imported everything.

A process that imports torch, DALI and DeepSpeed takes 6 s of a core before its first line of work. The forked one runs
`python -m MODULE WORDS` from there: with its own process group, environment, folder, output and interpreter's end. What
a library reads from the environment while it is loaded is that of the server, but for the threads of torch.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import NamedTuple

from mvd_scale.distributed.free_port import free_port
from tests.leftovers import TCP_TABLES, group_processes, listening_ports, wait_until_gone

ROOT = Path(__file__).resolve().parents[1]

LATE_IMPORTS = ("deepspeed", "matplotlib.pyplot", "torch.utils.tensorboard")
"""Imported by the package when they are first used, and by most runs."""

SECONDS_TO_LEAVE = 30
"""For the other ranks, when one has failed."""

SECONDS_TO_VANISH = 10
"""For children of the ranks, when those have ended."""


class Job(NamedTuple):
    """Processes that run `python -m MODULE WORDS` side by side, and write to one pipe."""

    module: str
    words: Sequence[str]
    folder: str
    environments: Sequence[Mapping[str, str]]


class ForkServer:
    """The process that is forked, as seen from the tests."""

    codes: Sequence[int] = ()
    """Exit codes of the ranks of the last job, in the order in which they ended."""

    def __init__(self) -> None:
        self._connection, there = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(there.fileno())],
            cwd=ROOT,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
        )
        there.close()

    def run(
        self,
        module: str,
        *words: str | Path,
        ranks: int | Sequence[int] = 0,
        env: Mapping[str, str | None] | None = None,
        seconds: float = 400,
    ) -> tuple[int, str]:
        """Run a module.

        Args:
            module: run as `python -m` does.
            words: its arguments.
            ranks: number of ranks, or of those of each host; 0 for a process that no launcher has started.
            env: variables besides those of this process; None for one that is not set.
            seconds: longest time until all have ended.

        Returns:
            Exit code, that of the first rank to fail if one does, and everything that was printed.

        Raises:
            TimeoutError: it took longer; nothing of it is left.
            AssertionError: all ranks have ended, but one of their children has not, or the port where they met is held.
        """
        wanted = {**os.environ, "DS_ACCELERATOR": "cpu", **(env or {})}
        environment = {name: value for name, value in wanted.items() if value is not None}
        places = launched_ranks([ranks] if isinstance(ranks, int) else ranks) if ranks else [{}]
        job = Job(module, [str(word) for word in words], os.getcwd(), [{**environment, **place} for place in places])
        output, theirs = os.pipe()
        self._connection.send(job)
        send_handle(self._connection, theirs, self._process.pid)
        os.close(theirs)
        group: int = self._connection.recv()
        self.codes = ()
        try:
            printed = _read_all(output, time.monotonic() + seconds)
            self.codes = self._connection.recv()
        finally:
            os.close(output)
            if not self.codes:
                os.killpg(group, signal.SIGKILL)
                self._connection.recv()
        check_leftovers(group, places[0].get("MASTER_PORT"))
        return next((code for code in self.codes if code), 0), printed.decode(errors="replace")

    def close(self) -> None:
        """End the server, which has no job any more."""
        self._connection.close()
        assert self._process.wait(timeout=60) == 0


def check_leftovers(group: int, port: str | None) -> None:
    """Check that nothing is left of a job whose ranks have ended.

    Args:
        group: process group of the job.
        port: port where its ranks met; None for a process alone.

    Raises:
        AssertionError: a process is left, which is killed then, or the port is held.
    """
    try:
        wait_until_gone(lambda: group_processes(group), SECONDS_TO_VANISH)
    except AssertionError:
        os.killpg(group, signal.SIGKILL)
        raise
    tables = "".join(Path(table).read_text() for table in TCP_TABLES if Path(table).exists())
    assert port is None or int(port) not in listening_ports(tables), f"port {port} is held"


def launched_ranks(hosts: Sequence[int]) -> list[dict[str, str]]:
    """The environment of each rank, as DeepSpeed's launcher sets it on hosts of so many ranks."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(sum(hosts))}
    host_of = [host for host, count in enumerate(hosts) for _ in range(count)]
    return [
        # Local ranks begin anywhere on a host that comes after one of another size.
        meeting
        | {"RANK": str(rank), "LOCAL_RANK": str(rank % hosts[host]), "LOCAL_SIZE": str(hosts[host])}
        | {"CROSS_RANK": str(host), "CROSS_SIZE": str(len(hosts))}
        for rank, host in enumerate(host_of)
    ]


def _read_all(pipe: int, deadline: float) -> bytes:
    """Read until all processes that could write are gone.

    Raises:
        TimeoutError: that takes longer.
    """
    chunks: list[bytes] = []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(
                f"not ended in time; printed so far:\n{b''.join(chunks)[-3000:].decode(errors='replace')}"
            )
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def serve(connection: Connection) -> Job | None:
    """Fork the processes of one job after the other.

    Returns:
        In a forked process the job that it runs a part of; in the server None, at the end.
    """
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return None
        output = recv_handle(connection)
        processes: list[int] = []
        for environment in job.environments:
            process = os.fork()
            if not process:
                connection.close()
                _become(job, environment, output, processes[0] if processes else 0)
                return job
            processes.append(process)
            # Here too, so that it is there when the group is named.
            os.setpgid(process, processes[0])
        os.close(output)
        connection.send(processes[0])
        connection.send(_wait(processes))


def _become(job: Job, environment: Mapping[str, str], output: int, group: int) -> None:
    os.setpgid(0, group)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.chdir(job.folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        import torch

        # torch has read the variable of the server.
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))


def _wait(processes: Sequence[int]) -> list[int]:
    """The exit codes as the ranks end; when one fails, the others are asked to end, and then made to."""
    codes: dict[int, int] = {}
    requests = iter([(0.0, signal.SIGTERM), (SECONDS_TO_LEAVE, signal.SIGKILL)])
    request, failed_at = next(requests), 0.0
    while len(codes) < len(processes):
        for process in [process for process in processes if process not in codes]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
                failed_at = failed_at or (time.monotonic() if codes[process] else 0.0)
        if failed_at and len(codes) < len(processes) and time.monotonic() - failed_at >= request[0]:
            os.killpg(processes[0], request[1])
            request = next(requests, (float("inf"), signal.SIGKILL))
        time.sleep(0.02)
    return list(codes.values())


def import_everything() -> None:
    """Import this package and what it imports when it runs."""
    import mvd_scale

    names = [module.name for module in pkgutil.walk_packages(mvd_scale.__path__, "mvd_scale.")]
    for name in (*names, *LATE_IMPORTS):
        # Who needs an optional package that is not there says so in the job.
        with suppress(ImportError):
            if not name.endswith("__main__"):
                importlib.import_module(name)
    # Else every forked process would search, and so copy, all that was imported when it ends: 2 s.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    there = Connection(int(sys.argv[1]))
    import_everything()
    asked = serve(there)
    if asked is not None:
        sys.argv = [asked.module, *asked.words]
        runpy.run_module(asked.module, run_name="__main__", alter_sys=True)
