"""The guard of a launcher passes signals to ranks alone, waits for all processes, and tells how they ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mvd_scale.distributed import launch_guard

_LAUNCHER = """
import os, signal, subprocess, sys, time
code, out, seconds = sys.argv[1:]
# A rank ends with 128 + the signal, after half a second; its helper inherits its environment, and would die at once.
rank = '''
import signal, subprocess, sys, time
helper = subprocess.Popen(["sleep", "100"])
def stop(number, frame):
    time.sleep(0.5)
    print(number, helper.poll(), file=open(sys.argv[1], "a"), flush=True)
    helper.kill()
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, stop)
open(sys.argv[1], "a").close()
time.sleep(100)
'''
process = subprocess.Popen([sys.executable, "-c", rank, out], env={**os.environ, "RANK": "0"})
time.sleep(float(seconds))
if code == "wait":
    sys.exit(process.wait())
if code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""

_ORPHANED_RANK = "import os, sys, time; time.sleep(3); sys.exit(143)"


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", launch_guard.__file__, sys.executable, "-c", _LAUNCHER, *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_not_their_helpers(number: signal.Signals, tmp_path: Path) -> None:
    guard = start("wait", str(tmp_path / "out"), "0")
    while not (tmp_path / "out").exists():
        time.sleep(0.02)
    everyone = psutil.Process(guard.pid).children(recursive=True)
    guard.send_signal(number)
    assert guard.wait(20) == 128 + number
    assert (tmp_path / "out").read_text() == f"{number.value} None\n"
    assert not any(process.is_running() for process in everyone)


@pytest.mark.parametrize("how", ["0", "killed"])
def test_ranks_whose_launcher_has_ended_are_asked_to_stop_and_waited_for(how: str, tmp_path: Path) -> None:
    guard = start(how, str(tmp_path / "out"), "1")
    code = guard.wait(20)
    assert (tmp_path / "out").read_text() == f"{signal.SIGTERM.value} None\n"
    assert code == (137 if how == "killed" else 143)


def test_a_rank_that_ended_before_its_killed_launcher_counts(tmp_path: Path) -> None:
    """The `deepspeed` command returns 0 when its part that started the ranks was killed; the rank may end before it."""
    inner = f"RANK=0 {sys.executable} -c '{_ORPHANED_RANK}' & sleep 2; kill -KILL $$"
    outer = f"import subprocess, time; subprocess.run(['bash', '-c', {inner!r}]); time.sleep(3)"
    guard = subprocess.Popen([sys.executable, "-P", launch_guard.__file__, sys.executable, "-c", outer])
    assert guard.wait(30) == 143


@pytest.mark.parametrize(("code", "said"), [("0", 0), ("2", 2), ("75", 75), ("143", 143), ("247", 137), ("-9", 137)])
def test_exit_codes(code: str, said: int) -> None:
    assert launch_guard.exit_code(int(code)) == said
