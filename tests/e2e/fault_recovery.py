"""Time that faults cost: `python -m tests.e2e.fault_recovery FOLDER` prints a table in Markdown.

Each row is a run of two ranks of a tiny model under `mvd-scale supervise` on this machine, with a checkpoint every 5
steps and a limit of 6 s for ranks that do not move. FOLDER receives the runs and the clips.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from mvd_scale.data.generated.sample_clips import write_sample_clips
from mvd_scale.utils.events import read_events
from mvd_scale.utils.io import read_metrics
from tests.e2e.conftest import RECIPE

STEP = 23
"""Number of completed steps after which the fault comes."""

SECONDS = 180.0
"""Longest wait for anything."""


class SupervisedRun:
    """Run of two ranks under `mvd-scale supervise`."""

    def __init__(self, folder: Path, recipe: Path, clips: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "mvd_scale", "supervise", "--ranks", "2", "--backoff-seconds", "0", "pretrain"]
        keys = ["--recipe", str(recipe), "--run.folder", str(folder), "--data.source", str(clips)]
        self.process = subprocess.Popen(
            [*command, *keys, "--training.hang_minutes", "0.1", "--training.epochs", "100"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )

    @property
    def step(self) -> int:
        """Number of completed steps."""
        metrics = self.folder / "metrics.jsonl"
        return max((reading["step"] for reading in read_metrics(metrics)), default=0) if metrics.exists() else 0

    def events(self, name: str) -> list[dict[str, object]]:
        """Events of a name."""
        return [event for event in read_events(self.folder / "events.jsonl") if event["event"] == name]

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


def kill_one(run: SupervisedRun) -> None:
    """Kill rank 1."""
    run.ranks()[1].kill()


def kill_main(run: SupervisedRun) -> None:
    """Kill rank 0, which has the store."""
    run.ranks()[0].kill()


def kill_all(run: SupervisedRun) -> None:
    """Kill all ranks at once."""
    for rank in run.ranks().values():
        rank.kill()


def stop_one(run: SupervisedRun) -> None:
    """Stop rank 1, as a debugger or a frozen container does."""
    run.ranks()[1].send_signal(signal.SIGSTOP)


def stop_main(run: SupervisedRun) -> None:
    """Stop rank 0."""
    run.ranks()[0].send_signal(signal.SIGSTOP)


FAULTS: dict[str, Callable[[SupervisedRun], None]] = {
    "SIGKILL of rank 1": kill_one,
    "SIGKILL of rank 0": kill_main,
    "SIGKILL of all ranks": kill_all,
    "SIGSTOP of rank 1": stop_one,
    "SIGSTOP of rank 0": stop_main,
}


def wait_for(condition: Callable[[], bool]) -> float:
    """Wait for a condition and return the time of the monotonic clock."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition is not met after {SECONDS:g} s")
        time.sleep(0.02)
    return time.monotonic()


def measure(name: str, folder: Path, recipe: Path, clips: Path) -> str:
    """Cause one fault, and return its row: seconds to the restart and to the next step, and steps lost."""
    run = SupervisedRun(folder / name.replace(" ", "_"), recipe, clips)
    try:
        wait_for(lambda: run.step >= STEP)
        FAULTS[name](run)
        began, reached = time.monotonic(), run.step
        restarted = wait_for(lambda: bool(run.events("restart")))
        resumed = wait_for(lambda: bool(run.events("resume")))
        first = int(str(run.events("resume")[0]["step"]))
        wait_for(lambda: run.step <= first)
        trains = wait_for(lambda: run.step > first)
        lost = max(reached - first, 0)
        return f"| {name} | {restarted - began:.1f} | {resumed - began:.1f} | {trains - began:.1f} | {lost} |"
    finally:
        run.end()


def main() -> None:
    """Measure every fault."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    clips = write_sample_clips(folder / "clips")
    print("| fault | seconds to the restart | to the checkpoint being loaded | to the next step | steps lost |")
    print("|---|---|---|---|---|")
    for name in FAULTS:
        print(measure(name, folder, recipe, clips), flush=True)


if __name__ == "__main__":
    main()
