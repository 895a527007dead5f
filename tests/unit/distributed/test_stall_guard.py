"""A process that is stopped is continued, and one that does not speak then is killed; others are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mvd_scale.distributed import stall_guard

_GUARDED = """
import faulthandler, signal, sys, time
from mvd_scale.distributed.stall_guard import StallGuard

faulthandler.register(signal.SIGUSR2, open(sys.argv[2], "w"))
with StallGuard(0.5) as guard:
    print(guard._process.pid, flush=True)
    while True:
        getattr(guard, sys.argv[1])()
        time.sleep(0.05)
        print("lives", flush=True)
"""


def start(action: str, stacks: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process that does something again and again, and its guard."""
    process = subprocess.Popen([sys.executable, "-c", _GUARDED, action, str(stacks)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, psutil.Process(int(process.stdout.readline()))


def test_a_stopped_process_writes_its_stacks_and_continues(tmp_path: Path) -> None:
    process, guard = start("beat", tmp_path / "stacks")
    process.send_signal(signal.SIGSTOP)
    while "sleep" not in (tmp_path / "stacks").read_text() and "line" not in (tmp_path / "stacks").read_text():
        time.sleep(0.02)
    psutil.Process(process.pid).status()
    assert process.poll() is None
    process.kill()
    process.wait()
    guard.wait(10)


def test_a_process_that_does_not_speak_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_guard, "SECONDS_TO_SPEAK", 0.2)
    silent = subprocess.Popen(["sleep", "100"], preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN))
    theirs, ours = os.pipe()
    stall_guard.guard(theirs, silent.pid, 0.2)
    assert silent.wait(10) == -signal.SIGKILL
    os.close(theirs)
    os.close(ours)
