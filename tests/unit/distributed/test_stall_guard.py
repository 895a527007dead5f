"""A process that is stopped is continued, and one that does not speak then is killed; others are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mvd_scale.distributed.health import stall_guard

_GUARDED = """
import faulthandler, signal, sys, time
from mvd_scale.distributed.health.stall_guard import StallGuard

faulthandler.register(signal.SIGUSR2, open(sys.argv[1], "w"))
with StallGuard(0.5) as guard:
    print("guarded", flush=True)
    while True:
        guard.beat()
        time.sleep(0.05)
"""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[psutil.Process]:
    """A process that beats all the time, and writes its stacks to the file `stacks`."""
    command = [sys.executable, "-c", _GUARDED, str(tmp_path / "stacks")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        yield psutil.Process(process.pid)
        process.kill()


def test_a_stopped_process_writes_its_stacks_and_continues(guarded: psutil.Process, tmp_path: Path) -> None:
    guarded.suspend()
    while guarded.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    while guarded.status() == psutil.STATUS_STOPPED:
        time.sleep(0.02)
    time.sleep(1)
    assert guarded.is_running()
    assert "File" in (tmp_path / "stacks").read_text()


def test_a_process_that_beats_is_left_alone(guarded: psutil.Process, tmp_path: Path) -> None:
    time.sleep(1.5)
    assert guarded.is_running()
    assert (tmp_path / "stacks").read_text() == ""


def test_the_guard_ends_with_its_process(guarded: psutil.Process) -> None:
    (guard,) = guarded.children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        guard.send_signal(number)
    time.sleep(0.2)
    assert guard.is_running()
    guarded.kill()
    guard.wait(10)


def test_a_process_that_does_not_speak_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_guard, "SECONDS_TO_SPEAK", 0.2)
    silent = subprocess.Popen(["sleep", "100"], preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN))
    theirs, ours = os.pipe()
    stall_guard.guard(theirs, silent.pid, 0.2)
    assert silent.wait(10) == -signal.SIGKILL
    os.close(theirs)
    os.close(ours)
