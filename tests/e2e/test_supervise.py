"""`mvd-scale supervise` on one host: a rank dies, a request to stop, invalid input, the supervisor is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from mvd_scale.utils.events import read_events
from mvd_scale.utils.io import read_metrics

from .conftest import Jobs, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def ranks_of(supervisor: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(supervisor.pid).children()


def listening_addresses(processes: list[psutil.Process]) -> set[str]:
    numbers = {process.pid for process in processes}
    found = [connection for connection in psutil.net_connections("inet") if connection.pid in numbers]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def saved(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob("step_*")}


def restarts(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == "restart"]


def test_a_run_goes_on_after_a_rank_died_and_stops_on_request(
    jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["pretrain", "--recipe", recipe, "--run.folder", run, "--data.source", clips, "--training.epochs", "900"]
    # 3 ranks do not divide the global batch of 4.
    command = ["supervise", "--ranks", "3", "--backoff-seconds", "0.5", "--", *words]
    supervisor = jobs.start(*command)
    wait_for(lambda: bool(saved(run)), 120, supervisor)
    ranks = ranks_of(supervisor)
    assert len(ranks) == 2
    assert listening_addresses([*ranks, *[child for rank in ranks for child in rank.children(True)]]) == {"127.0.0.1"}
    assert listening_addresses([psutil.Process(supervisor.pid)]) == set()

    ranks[1].kill()
    wait_for(lambda: bool(restarts(run)), 120, supervisor)
    before = saved(run)
    wait_for(lambda: bool(saved(run) - before), 120, supervisor)
    (restart,) = restarts(run)
    assert (restart["reason"], restart["ranks"], restart["attempt"]) == ("fault, exit code -9", 2, 2)

    supervisor.send_signal(signal.SIGUSR1)
    output, _ = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 128 + signal.SIGUSR1, output[-3000:]
    assert output.count("stopped on request after saving a checkpoint") == 1
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))
    assert f"step_{steps[-1]:08d}" in saved(run)

    # Without its supervisor, nobody would ever end the ranks.
    supervisor = jobs.start(*command)
    wait_for(lambda: bool(saved(run) - {f"step_{steps[-1]:08d}"} - before), 120, supervisor)
    ranks = ranks_of(supervisor)
    os.kill(supervisor.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive


def test_invalid_input_is_told_once(jobs: Jobs, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = ["--recipe", recipe, "--run.folder", tmp_path / "run", "--data.source", tmp_path / "empty"]
    supervisor = jobs.start("supervise", "--ranks", "2", "--", "pretrain", *words)
    output, _ = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 2
    assert output.count("mvd-scale: ") == 1, output
    assert "Traceback" not in output
