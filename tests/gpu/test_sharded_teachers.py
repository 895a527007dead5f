"""fp16 teachers in shards on two GPUs, which NCCL gathers."""

from __future__ import annotations

import pytest

from mvd_scale.performance.bringup.checks.zero import judge_teachers
from mvd_scale.performance.bringup.session import Check

from .conftest import Figure, Seen

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]


def test_sharded_fp16_teachers_give_the_features_of_whole_float32_ones(two: Seen, check: Check, figure: Figure) -> None:
    figure("ranks", len(two))
    judge_teachers(check, [rank["sharded teachers"] for rank in two])
