"""Runs, benchmarks and profiles make the same steps, whether somebody times their parts or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.utils.io import read_metrics

from .conftest import Jobs, plain_steps

pytestmark = pytest.mark.slow

STEPS = 3
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Then the same steps give the same bits."""


def test_a_timer_is_told_of_the_parts_in_order_and_changes_no_loss(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    words = [
        "quickstart/student", "--data.source", clips, "--training.warmup_epochs", "0", "--training.micro_batch", "1",
        "--targets.average", "{kind: momentum, momentum: 0.9, decoder: {width: 32, depth: 1, heads: 2}}",
    ]  # fmt: skip
    timed = plain_steps(jobs, STEPS, tmp_path, "--timer", *words, env=ONE_THREAD)
    plain = plain_steps(jobs, STEPS, tmp_path, *words, env=ONE_THREAD)
    assert plain["parts"] is None
    assert timed["losses"] == plain["losses"]
    assert len({loss for step in plain["losses"] for loss in step}) == 2 * STEPS
    teachers = [f"{name} teacher" for name in ("image", "video", "average")]
    micro = ["data wait", "student forward", *teachers, "backward", "optimizer"]
    assert timed["parts"] == [*micro, *micro, "moving average"] * STEPS
    assert set(timed["parts"]) == set(timed["names"])


def test_a_benchmark_makes_the_steps_of_a_run(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    """The learning rate is constant, because a benchmark has another number of steps in an epoch."""
    words = [
        "--data.source", clips, "--data.clips_per_video", "10", "--training.micro_batch", "null", "--training.min_lr",
        "1e-2", "--training.warmup_epochs", "0", "--training.max_steps", str(STEPS), "--run.folder", tmp_path / "run",
    ]  # fmt: skip
    code, output = jobs.run("pretrain", "--recipe", recipe, *words, "--training.global_batch", "2", env=ONE_THREAD)
    assert code == 0, output
    losses = [reading["loss"] for reading in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(set(losses)) == STEPS
    measured = plain_steps(jobs, STEPS, tmp_path, recipe, *words, env=ONE_THREAD)
    assert measured["losses"] == [[loss] for loss in losses]
