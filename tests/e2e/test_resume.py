"""A run that was killed and resumed gives the same losses as an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from mvd_scale.utils.io import read_metrics

from .conftest import Jobs, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def numbers(run: Path) -> list[tuple[float, ...]]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in read_metrics(run / "metrics.jsonl")]


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(read_metrics(metrics)) if metrics.exists() else 0


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_killed_run_continues_bit_for_bit(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    # With a moving average, which must come back too.
    average = "{kind: momentum, momentum: 0.9, norm: true, decoder: {width: 32, depth: 1, heads: 2}}"
    arguments = ["pretrain", "--recipe", recipe, "--data.source", clips, "--targets.average", average]
    arguments += ["--teachers.sharding", "zero3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = jobs.run(*arguments, "--run.folder", whole, ranks=2)
    assert code == 0, output

    process = jobs.start(*arguments, "--run.folder", killed, ranks=2)
    # An epoch has ten steps: 17 is in the middle of the second, two steps after a checkpoint.
    wait_for(lambda: steps_done(killed) >= 17, 120, process)
    jobs.kill(process)
    assert steps_done(killed) < 60
    code, output = jobs.run(*arguments, "--run.folder", killed, ranks=2)
    assert code == 0, output
    assert "resumed from" in output

    assert numbers(killed) == numbers(whole)
    for name in ("encoder.safetensors", "student.safetensors", "momentum_average.safetensors"):
        ours, theirs = (load_file(run / name) for run in (killed, whole))
        assert all((ours[key] == theirs[key]).all() for key in theirs)
    assert sorted(p.name for p in (whole / "checkpoints").glob("step_*")) == ["step_00000055", "step_00000060"]


@pytest.mark.serial
def test_a_half_written_checkpoint_is_passed_over(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", "--recipe", recipe, "--data.source", clips, "--run.folder", run]
    code, output = jobs.run(*arguments, "--training.max_steps", "5")
    assert code == 0, output
    partial = run / "checkpoints" / "step_00000006.partial"
    partial.mkdir()
    (run / "summary.json").unlink()
    code, output = jobs.run(*arguments, "--training.max_steps", "7")
    assert code == 0, output
    assert "resumed from" in output
    assert not partial.exists()
    assert [step for step, *_ in numbers(run)] == list(range(1, 8))


def test_a_torn_checkpoint_is_passed_over(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", "--recipe", recipe, "--data.source", clips, "--run.folder", run]
    code, output = jobs.run(*arguments, "--training.max_steps", "10")
    assert code == 0, output
    (run / "summary.json").unlink()
    torn = run / "checkpoints" / "step_00000010"
    (file,) = torn.glob("__0_0.distcp")
    file.write_bytes(file.read_bytes()[:-1000])
    code, output = jobs.run(*arguments, "--training.max_steps", "12")
    assert code == 0, output
    assert "step_00000010 is torn: __0_0.distcp has" in output
    assert "resumed from" in output
    assert torn.with_name("step_00000010.torn").is_dir()
    assert [step for step, *_ in numbers(run)] == list(range(1, 13))


def test_a_run_that_is_asked_to_stop_saves_first(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", "--recipe", recipe, "--data.source", clips, "--run.folder", run]
    process = jobs.start(*arguments, "--training.epochs", "500", ranks=2)
    wait_for(lambda: steps_done(run) >= 6, 120, process)
    # What a terminal does on Ctrl-C.
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    # The launcher itself shows one; no rank does.
    assert "mvd_scale/training" not in output, output
    assert output.count("stopped on request") == 1
    newest = max(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*"))
    assert newest == steps_done(run)


def test_a_rank_that_dies_ends_the_job(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", "--recipe", recipe, "--data.source", clips, "--run.folder", run]
    process = jobs.start(*arguments, "--training.epochs", "500", ranks=2)
    # A checkpoint is written beside the steps.
    wait_for(lambda: (run / "checkpoints" / "step_00000005").is_dir(), 120, process)
    everyone = descendants(process)
    ranks = [p for p in everyone if "mvd_scale" in p.cmdline() and "deepspeed.launcher.launch" not in p.cmdline()]
    assert len(ranks) == 2
    ranks[1].kill()
    process.communicate(timeout=90)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive
    state = json.loads((run / "checkpoints" / "step_00000005" / "state.json").read_text())
    assert state["layout"]["ranks"] == 2
