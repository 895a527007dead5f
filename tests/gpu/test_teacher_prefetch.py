"""Teachers that work on the next batch beside the student."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mvd_scale.data.batch import ClipBatch
from mvd_scale.performance.bringup.checks.streams import EXPECTED, LONG, early, late, overlap, read_by_student
from mvd_scale.performance.bringup.checks.zero_ranks import STAGES

from .conftest import Figure, Seen

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("teach", "sleep"), [(late, 0), (early, LONG)])
def test_the_student_reads_what_the_side_stream_wrote_for_it(
    gpu: torch.device, teach: Callable[[ClipBatch], ClipBatch], sleep: int
) -> None:
    assert read_by_student(gpu, teach, sleep) == EXPECTED


def test_both_streams_work_at_once_and_the_host_waits_for_neither(gpu: torch.device, figure: Figure) -> None:
    share, ahead = overlap(gpu)
    figure("share of the time of one after the other", share)
    assert ahead
    assert share < 0.7


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_the_step_one_after_the_other(stage: str, most: Seen, figure: Figure) -> None:
    """With sharded teachers, two micro batches a step."""
    figure("ranks", len(most))
    for rank in most:
        # Atomic additions of the backward passes have another order in each run, and each step enlarges the rounding.
        # Losses from the features of another batch differ by percents.
        assert rank[f"ahead, {stage}"] == pytest.approx(rank[f"fp32, {stage}"], rel=1e-4)
