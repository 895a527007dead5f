"""Losses in float32 and fp16, and loss scaling."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.performance.bringup.checks.zero import TOLERANCE, judge_losses, judge_overflow, judge_teachers
from mvd_scale.performance.bringup.checks.zero_ranks import STAGES
from mvd_scale.performance.bringup.session import Check

from .conftest import Figure, Seen, launch

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]


def test_the_gpu_gives_the_losses_of_the_cpu(one: Seen, tmp_path: Path, check: Check) -> None:
    (cpu,) = launch("cpu", 1, tmp_path / "out")
    judge_losses(check, [one[0]["fp32, zero1"]], cpu["fp32, zero1"], TOLERANCE["fp32"])


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_stays_near_float32(stage: str, most: Seen, check: Check, figure: Figure) -> None:
    figure("ranks", len(most))
    losses = [rank[f"fp16, {stage}"] for rank in most]
    judge_losses(check, losses, most[0]["fp32, zero1"], TOLERANCE["fp16"])


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_skips_the_step_and_halves_the_scale(stage: str, most: Seen, check: Check, figure: Figure) -> None:
    figure("ranks", len(most))
    judge_overflow(check, [rank[f"overflow, {stage}"] for rank in most])


def test_fp16_teachers_of_one_zero3_rank_give_the_features_of_float32_ones(one: Seen, check: Check) -> None:
    """One rank gathers nothing: `test_sharded_teachers` needs two GPUs."""
    judge_teachers(check, [one[0]["sharded teachers"]])
