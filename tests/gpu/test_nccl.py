"""NCCL with two GPUs."""

from __future__ import annotations

import pytest

from .conftest import Seen

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]


def test_nccl_sums_over_two_gpus(two: Seen) -> None:
    assert [rank["sum over ranks"] for rank in two] == [3.0, 3.0]


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_two_gpus_give_the_losses_of_one(stage: str, one: Seen, two: Seen) -> None:
    for rank in two:
        assert rank[f"fp32, {stage}"] == pytest.approx(one[0]["fp32, zero1"], rel=2e-5)
