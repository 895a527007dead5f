"""Time that faults cost: `python -m tests.e2e.fault_recovery FOLDER [WORD]` prints a table in Markdown.

Each row is a run of two ranks of a tiny model under `mvd-scale supervise`, with a checkpoint every 5 steps and a limit
of 6 s for ranks that do not move: on this machine, or for faults of hosts on the two hosts of `tests/two_hosts`, which
need root. FOLDER receives the runs and the clips; with WORD only the faults run whose names contain it. What goes on is
told on standard error.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from mvd_scale.data.generated.sample_clips import write_sample_clips
from mvd_scale.utils.events import read_events
from tests.e2e.conftest import RECIPE
from tests.two_hosts.job import rank_on, readings
from tests.two_hosts.network import connected_hosts
from tests.two_hosts.supervised_run import SupervisedRun

STEP = 23
"""Number of completed steps after which the fault comes."""

SECONDS = 180.0
"""Longest wait for anything."""

TRAINING = ("--training.hang_minutes", "0.1", "--training.epochs", "500")


class OneHostRun:
    """Run of two ranks under `mvd-scale supervise` on this machine.

    Args:
        words: command and recipe.
        folder: folder of the run.
        fault: fault of `faulty.py` that comes to a rank by itself after `STEP` steps, and its rank; None for none.
    """

    def __init__(self, words: list[str], folder: Path, fault: tuple[str, int] | None = None) -> None:
        self.folder = folder
        self.mark = folder.with_name(f"{folder.name}_fault")
        """File that such a fault makes when it comes."""
        module = ["mvd_scale"] if fault is None else ["tests.e2e.faulty", *map(str, fault), str(STEP)]
        command = [sys.executable, "-m", *module, "supervise", "--ranks", "2", "--backoff-seconds", "0"]
        self.process = subprocess.Popen(
            [*command, *words, "--run.folder", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "FAULT_ONCE": str(self.mark)},
        )

    def ranks(self) -> dict[int, psutil.Process]:
        """Processes of the ranks."""
        return {int(child.environ()["RANK"]): child for child in psutil.Process(self.process.pid).children()}

    def end(self) -> None:
        """Kill the supervisor and its ranks."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in processes:
            process.kill()
        self.process.wait()


def kill_ranks(run: OneHostRun) -> None:
    """Kill all ranks at once."""
    for rank in run.ranks().values():
        rank.kill()


RANK_FAULTS: dict[str, Callable[[OneHostRun], None]] = {
    "SIGKILL of rank 1": lambda run: run.ranks()[1].kill(),
    "SIGKILL of rank 0, which has the store": lambda run: run.ranks()[0].kill(),
    "SIGKILL of all ranks": kill_ranks,
    "SIGSTOP of rank 1": lambda run: run.ranks()[1].send_signal(signal.SIGSTOP),
    "SIGSTOP of rank 0": lambda run: run.ranks()[0].send_signal(signal.SIGSTOP),
}
"""Faults of processes, on one host."""

INNER_FAULTS = {
    "rank 1 blocks in the loader": ("loader", 1),
    "rank 0 blocks in the optimizer": ("optimizer", 0),
    "the writing of checkpoints blocks on rank 1": ("save", 1),
    "an error of the program on rank 1": ("crash", 1),
}
"""Faults within a rank, which come by themselves: names and ranks of functions of `faulty.py`."""

HOST_FAULTS: dict[str, Callable[[SupervisedRun], None]] = {
    "SIGKILL of the rank of the second host": lambda run: rank_on(run.hosts[1]).kill(),
    "SIGSTOP of the rank of the second host": lambda run: rank_on(run.hosts[1]).send_signal(signal.SIGSTOP),
    "SIGKILL of the supervisor of the second host": lambda run: rank_on(run.hosts[1]).parent().kill(),
    "SIGKILL of everything on the second host": lambda run: run.hosts[1].kill_all(),
    "SIGKILL of everything on the first host": lambda run: run.hosts[0].kill_all(),
    "cable unplugged": lambda run: run.hosts[1].link_down(),
    "cable cut from the second host to the first": lambda run: run.hosts[1].stop_sending(),
}
"""Faults of a host or the cable, on two hosts with one rank each, of which those that are left go on."""


@contextmanager
def one_host(words: list[str], folder: Path, fault: tuple[str, int] | None = None) -> Iterator[OneHostRun]:
    """Start a run on this machine, which ends with the `with` block."""
    run = OneHostRun(words, folder, fault)
    try:
        yield run
    finally:
        run.end()


@contextmanager
def two_hosts(words: list[str], folder: Path) -> Iterator[SupervisedRun]:
    """Start a run on two hosts, which end with the `with` block."""
    scratch = folder.with_name(f"{folder.name}_hosts")
    scratch.mkdir(exist_ok=True)
    with connected_hosts(scratch) as hosts:
        run = SupervisedRun(hosts, words, scratch)
        for host in hosts:
            run.start(host)
        yield run


def step_of(folder: Path) -> int:
    """Number of completed steps of a run."""
    return max(readings(folder), default=0)


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Events of a name of a run."""
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == name]


def wait_for(condition: Callable[[], bool]) -> float:
    """Wait for a condition and return the time of the monotonic clock."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition is not met after {SECONDS:g} s")
        time.sleep(0.02)
    return time.monotonic()


def measure(folder: Path, fault: Callable[[], None]) -> str:
    """Cause a fault in a run, and return the cells of its row: seconds to restart and next step, and steps lost.

    Raises:
        TimeoutError: the run does not train, or not again.
    """
    wait_for(lambda: step_of(folder) >= STEP)
    tell(f"fault after step {step_of(folder)}")
    began = time.monotonic()
    fault()
    reached = step_of(folder)
    restarted = wait_for(lambda: bool(events_of(folder, "restart")))
    tell(f"restart: {events_of(folder, 'restart')[0]['reason']}")
    resumed = wait_for(lambda: bool(events_of(folder, "resume")))
    first = int(events_of(folder, "resume")[0]["step"])
    tell(f"resumed from step {first}")
    wait_for(lambda: step_of(folder) <= first)
    trains = wait_for(lambda: step_of(folder) > first)
    lost = max(reached - first, 0)
    return f"{restarted - began:.1f} | {resumed - began:.1f} | {trains - began:.1f} | {lost}"


def tell(text: str) -> None:
    """Print what goes on."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def wait_for_mark(run: OneHostRun) -> None:
    """Wait until the fault within a rank has come."""
    wait_for(run.mark.exists)


def main() -> None:
    """Measure every fault whose name is asked for."""
    folder, word = Path(sys.argv[1]).resolve(), " ".join(sys.argv[2:])
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    words = ["pretrain", "--recipe", str(recipe), "--data.source", str(write_sample_clips(folder / "clips")), *TRAINING]
    faults: list[tuple[str, Callable[..., Any], Callable[[Any], None]]] = [
        *((name, one_host, fault) for name, fault in RANK_FAULTS.items()),
        *((name, partial(one_host, fault=fault), wait_for_mark) for name, fault in INNER_FAULTS.items()),
        *((name, two_hosts, fault) for name, fault in HOST_FAULTS.items()),
    ]
    print("| fault | seconds to the restart | to the checkpoint being loaded | to the next step | steps lost |")
    print("|---|---|---|---|---|", flush=True)
    for number, (name, start, fault) in enumerate(faults):
        if word not in name:
            continue
        tell(f"{number + 1} of {len(faults)}: {name}")
        try:
            with start(words, folder / str(number)) as run:
                print(f"| {name} | {measure(run.folder, partial(fault, run))} |", flush=True)
        except (TimeoutError, pytest.skip.Exception) as reason:
            print(f"| {name} | not measured: {reason} | | | |", flush=True)


if __name__ == "__main__":
    main()
