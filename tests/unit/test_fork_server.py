"""Forked processes are as good as started ones: their exit codes, their output and their end."""

from __future__ import annotations

import time

import psutil
import pytest

from tests import fork_server as module
from tests.fork_server import ForkServer
from tests.leftovers import find_processes, wait_until_gone

RUN = ("timeit", "-n", "1", "-r", "1")
"""A module of Python that runs the line after it, and exits with 1 if that fails."""


def test_every_rank_has_its_environment_and_all_outputs_come_back(fork_server: ForkServer) -> None:
    # In one write, since the ranks share the pipe and may print at the same time.
    words = (
        "import os; os.write(1, (' '.join(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'GIVEN')) + chr(10)).encode())"
    )
    code, output = fork_server.run(*RUN, words, ranks=[1, 2], env={"GIVEN": "yes"})
    assert code == 0
    assert {"0 0 yes", "1 1 yes", "2 0 yes"} <= set(output.splitlines())


def test_a_rank_that_fails_ends_the_others(fork_server: ForkServer) -> None:
    started = time.monotonic()
    words = "import os, time; time.sleep(100 if os.environ['RANK'] == '0' else 0); raise ValueError('rank 1')"
    code, output = fork_server.run(*RUN, words, ranks=2)
    assert code == 1
    assert output.count("ValueError: rank 1") == 1
    assert time.monotonic() - started < 50


def test_a_child_that_outlives_its_rank_is_named_and_killed(
    fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_TO_VANISH", 0.2)
    # Its outputs lead elsewhere: nobody waits for their end.
    words = "import subprocess; subprocess.Popen(['sleep', '98.5'], stdout=-3, stderr=-3)"
    with pytest.raises(AssertionError, match=r"left after 0 s: \['\d+: sleep 98.5'\]"):
        fork_server.run(*RUN, words, ranks=1)
    wait_until_gone(lambda: find_processes(lambda pid: psutil.Process(pid).cmdline() == ["sleep", "98.5"]), 5)


def test_a_port_that_is_held_is_named(fork_server: ForkServer) -> None:
    """By a process that has left the group of the job."""
    words = (
        "import os, socket, subprocess; s = socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT']))); "
        "subprocess.Popen(['sleep', '2'], pass_fds=[s.fileno()], stdout=-3, stderr=-3, start_new_session=True)"
    )
    with pytest.raises(AssertionError, match=r"port \d+ is held"):
        fork_server.run(*RUN, words, ranks=1)


def test_a_job_that_takes_too_long_leaves_nobody_behind(fork_server: ForkServer) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(TimeoutError):
        fork_server.run(*RUN, "import time; time.sleep(100)", ranks=2, seconds=0.5)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert fork_server.run("mvd_scale", "--version")[0] == 0
