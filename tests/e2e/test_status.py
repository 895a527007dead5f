"""A run writes what happens to it, and `mvd-scale status` tells it, while it goes on and after it was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.utils.events import read_events

from .conftest import Jobs, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def status(jobs: Jobs, run: Path) -> dict[str, Any]:
    code, output = jobs.run("status", run, "--json")
    assert code == 0, output
    (found,) = json.loads(output)["runs"]
    return found


def test_a_run_is_told_while_it_goes_on_after_a_kill_and_at_its_end(
    jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path
) -> None:
    run, exported = tmp_path / "run", tmp_path / "run.prom"
    arguments = ["pretrain", "--recipe", recipe, "--data.source", clips, "--run.folder", run]
    arguments += ["--logging.prometheus", exported, "--training.epochs", "500"]
    process = jobs.start(*arguments, ranks=2)
    wait_for(lambda: (run / "checkpoints" / "step_00000010").is_dir(), 120, process)
    running = status(jobs, run)
    assert (running["state"], running["total_steps"], running["ranks"]) == ("running", 5000, 2)
    assert running["hosts"] == {socket.gethostname(): 2}
    assert running["step"] >= 9
    assert running["eta_seconds"] > 0
    code, output = jobs.run(*arguments)
    assert code == 2
    assert re.search(rf"another process is training in .*: process \d+ of host {socket.gethostname()} since 20", output)

    jobs.kill(process)
    dead = status(jobs, run)
    assert dead["state"] == "dead"
    assert re.fullmatch(rf"process \d+ of host {socket.gethostname()} renewed its lease last at 20\S+", dead["note"])
    last = dead["checkpoint"]["step"] + 3

    # At once: the process is known to be gone.
    code, output = jobs.run(*arguments, "--training.max_steps", str(last), ranks=2)
    assert code == 0, output
    finished = status(jobs, run)
    assert (finished["state"], finished["step"], finished["total_steps"]) == ("finished", last, last)

    events = read_events(run / "events.jsonl")
    names = [event["event"] for event in events]
    assert names[0] == "start"
    assert names.count("start") == 2
    assert names[names.index("resume") - 1] == "start"
    resumed = events[names.index("resume")]
    assert resumed["step"] % 5 == 0
    assert resumed["before"]["ranks"] == 2
    assert (events[-1]["event"], events[-1]["reason"], events[-1]["step"]) == ("end", "finished", last)
    saved = [event for event in events if event["event"] == "save"]
    assert [event["step"] for event in saved] == [*range(5, last, 5), last]
    assert all(event["bytes"] > 10_000 and event["seconds_written"] > 0 for event in saved)
    assert Path(saved[-1]["checkpoint"]).is_dir()
    assert f'mvd_scale_step{{run="{run}"}} {last}.0' in exported.read_text()
    assert f'mvd_scale_running{{run="{run}"}} 0.0' in exported.read_text()


@pytest.mark.extended
def test_a_run_that_is_asked_to_stop_is_stopped(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = jobs.start(
        "pretrain", "--recipe", recipe, "--data.source", clips, "--run.folder", run, "--training.epochs", "500"
    )
    wait_for((run / "metrics.jsonl").is_file, 120, process)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    stopped = status(jobs, run)
    assert (stopped["state"], stopped["note"]) == ("stopped", "exit code 143")
    assert stopped["checkpoint"]["step"] == stopped["step"]
