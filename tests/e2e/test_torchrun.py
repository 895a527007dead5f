"""Runs under torchrun: resumed, stopped by signals, and ended with the exit code of their ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mvd_scale.distributed.free_port import free_port
from mvd_scale.utils.io import read_metrics

from .conftest import Jobs, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

OURS = "mvd_scale.distributed.torchrun"


def start(jobs: Jobs, *words: str | Path, module: str = OURS) -> subprocess.Popen[str]:
    return jobs.start_command([sys.executable, "-m", module, "--nproc-per-node", "2", *map(str, words)])


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run / "metrics.jsonl")]


def steps_done(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").exists() else 0


def test_a_run_resumes_under_torchrun_bit_for_bit(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    words = ["-m", "mvd_scale", "pretrain", "--recipe", recipe, "--data.source", clips, "--run.folder"]
    whole, parted = tmp_path / "whole", tmp_path / "parted; it's"
    code, output = finish(start(jobs, *words, whole, "--training.max_steps", "8"))
    assert code == 0, output
    code, output = finish(start(jobs, *words, parted, "--training.max_steps", "5", module="torch.distributed.run"))
    assert code == 0, output
    (parted / "summary.json").unlink()
    code, output = finish(start(jobs, *words, parted, "--training.max_steps", "8"))
    assert code == 0, output
    assert "resumed from" in output
    assert losses(parted) == losses(whole)


@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGUSR1, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.extended)],
    ids=["SIGUSR1 to all processes", "SIGTERM to torchrun alone"],
)
def test_a_signal_saves_and_is_reported(
    jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path, number: signal.Signals, everyone: bool
) -> None:
    """Slurm and Kubernetes signal the first process of a task or container, or all of them: data workers too."""
    run = tmp_path / "run"
    words = ["-m", "mvd_scale", "pretrain", "--recipe", recipe, "--data.source", clips, "--run.folder", run]
    process = start(jobs, *words, "--training.epochs", "500", "--data.workers", "1")
    wait_for(lambda: steps_done(run) >= 3, 120, process)
    processes = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if everyone else os.kill)(process.pid, number)
    code, output = finish(process)
    assert code == 128 + number, output
    assert output.count("stopped on request") == 1, output
    newest = max(int(folder.name.removeprefix("step_")) for folder in (run / "checkpoints").glob("step_*"))
    assert newest == steps_done(run)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def test_invalid_input_is_told_from_a_fault(jobs: Jobs, tmp_path: Path) -> None:
    code, output = finish(start(jobs, "-m", "mvd_scale", "pretrain", "--recipe", tmp_path / "none.yaml"))
    assert code == 2, output
    code, output = finish(start(jobs, "-m", "mvd_scale", "recipes"))
    assert code == 0, output


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param("exit 75", 75, id="fault", marks=pytest.mark.extended),
        pytest.param("kill -KILL $$", 137, id="killed"),
    ],
)
def test_the_code_of_the_rank_that_failed_is_that_of_torchrun(jobs: Jobs, script: str, expected: int) -> None:
    code, output = finish(start(jobs, "--no-python", "sh", "-c", f'[ "$RANK" = 0 ] && exec sleep 100; {script}'))
    assert code == expected, output


@pytest.mark.extended
def test_ranks_get_their_words_as_they_are(jobs: Jobs) -> None:
    words = ["a$$b", "${local_rank}", "$(id)", "two words", "it's; \"", "line\nbreak", "*"]
    code, output = finish(start(jobs, "--no-python", sys.executable, "-c", "import sys; print(sys.argv[1:])", *words))
    assert code == 0, output
    assert output.count(str(words)) == 2, output


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ([], "127.0.0.1"),
        pytest.param(["--standalone"], "127.0.0.1", marks=pytest.mark.extended),
        (["--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.2"], "127.0.0.2"),
    ],
    ids=["one host", "standalone", "two hosts"],
)
def test_it_listens_at_the_address_of_the_job_alone(jobs: Jobs, options: list[str], address: str) -> None:
    ports = ["--master-port", str(free_port())] if "--nnodes" in options else []
    process = start(jobs, *options, *ports, "--no-python", "sleep", "100")
    wait_for(lambda: bool(listening(process)), 60, process)
    time.sleep(0.5)
    assert {found.ip for found in listening(process)} == {address}
    # Workers of torchrun have sessions of their own, so that they would outlive it, and hold its output.
    for member in psutil.Process(process.pid).children(recursive=True):
        member.kill()


def listening(process: subprocess.Popen[str]) -> set[Any]:
    """Addresses at which the processes of a job listen."""
    addresses = set()
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            addresses |= {c.laddr for c in member.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return addresses


@pytest.mark.extended
def test_a_port_in_use_is_named(jobs: Jobs) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, output = finish(start(jobs, "--master-port", port, "-m", "mvd_scale", "recipes"))
    assert code == 75, output
    assert f"127.0.0.1:{port} cannot be used (Address already in use)" in output


@pytest.mark.extended
def test_hosts_that_do_not_meet_are_a_fault(jobs: Jobs) -> None:
    lost = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "9"]
    code, output = finish(start(jobs, *lost, "--rdzv-conf", "timeout=2", "-m", "mvd_scale", "recipes"))
    assert code == 75, output
    assert "mvd-scale: the hosts did not meet" in output
