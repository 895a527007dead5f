"""NCCL with two GPUs."""

from __future__ import annotations

import pytest

from mvd_scale.performance.bringup.checks.zero import judge_losses, judge_sum
from mvd_scale.performance.bringup.checks.zero_ranks import STAGES
from mvd_scale.performance.bringup.session import Check

from .conftest import Seen

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]


def test_nccl_sums_over_two_gpus(two: Seen, check: Check) -> None:
    judge_sum(check, [rank["sum over ranks"] for rank in two])


@pytest.mark.parametrize("stage", STAGES)
def test_two_gpus_give_the_losses_of_one(stage: str, one: Seen, two: Seen, check: Check) -> None:
    judge_losses(check, [rank[f"fp32, {stage}"] for rank in two], one[0]["fp32, zero1"], 2e-5)
