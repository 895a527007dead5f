"""Stacks of all threads are written to the file of a rank, also while threads begin and end."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from mvd_scale.distributed.health.stack_file import StackFile

BUSY = """
import sys, threading, time
from pathlib import Path
from mvd_scale.distributed.health.stack_file import StackFile

def begin_and_end():
    while True:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()

sys.setswitchinterval(1e-5)
for _ in range(4):
    threading.Thread(target=begin_and_end, daemon=True).start()
with StackFile(Path(sys.argv[1]), 0) as stacks:
    until = time.monotonic() + 2
    while time.monotonic() < until:
        stacks.write("a fault")
print("whole", flush=True)
import os
os._exit(0)
"""


def waits_for(event: threading.Event) -> None:
    event.wait()


def test_the_stack_of_each_thread_is_there_with_its_name(tmp_path: Path) -> None:
    event = threading.Event()
    other = threading.Thread(target=waits_for, args=(event,), name="loader")
    other.start()
    with StackFile(tmp_path / "faults", 3) as stacks:
        stacks.write("rank 1 hangs")
        event.set()
        other.join()
    text = (tmp_path / "faults" / "rank_3.txt").read_text()
    assert "rank 1 hangs" in text
    _, of_loader = text.split("[loader] (most recent call first):")
    assert " in waits_for\n" in of_loader
    assert " in test_the_stack_of_each_thread_is_there_with_its_name\n" in text


def test_stacks_can_be_written_while_threads_begin_and_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BUSY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "whole\n", (done.returncode, done.stderr[-2000:])
