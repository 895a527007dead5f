"""Teachers that work on the next batch beside the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mvd_scale.data.batch import ClipBatch
from mvd_scale.training.teachers.prefetch import PrefetchStream, TeacherPrefetcher

from ..batches import BatchLoader
from .conftest import Figure, Seen

pytestmark = pytest.mark.gpu

BATCHES, NUMBERS = 8, 2**22
LONG = 50_000_000
"""Cycles for which a stream is kept busy: some hundredths of a second."""


def _batches(gpu: torch.device) -> Iterator[ClipBatch]:
    """Batch k is full of k."""
    for k in range(BATCHES):
        full = torch.full((NUMBERS,), float(k), device=gpu)
        yield ClipBatch(full, full, full, full, torch.tensor(k))


def _late(batch: ClipBatch) -> ClipBatch:
    """Features that come long after the host has gone on."""
    torch.cuda._sleep(LONG)
    return replace(batch, features={"teacher": 2 * batch.pixels})


def _early(batch: ClipBatch) -> ClipBatch:
    """Features that come long before the student is done with those before them."""
    return replace(batch, features={"teacher": 2 * batch.pixels})


@pytest.mark.parametrize(("teach", "sleep"), [(_late, 0), (_early, LONG)])
def test_the_student_reads_what_the_side_stream_wrote_for_it(
    gpu: torch.device, teach: Callable[[ClipBatch], ClipBatch], sleep: int
) -> None:
    read: list[Tensor] = []
    for batch in TeacherPrefetcher(BatchLoader(_batches(gpu)), PrefetchStream(gpu, teach)):
        if sleep:
            torch.cuda._sleep(sleep)
        read.append(torch.stack([batch.pixels.amin(), batch.pixels.amax()]))
        read.append(torch.stack([batch.features["teacher"].amin(), batch.features["teacher"].amax()]) / 2)
    assert torch.stack(read).tolist() == [[k, k] for k in range(BATCHES) for _ in range(2)]


def test_both_streams_work_at_once_and_the_host_waits_for_neither(gpu: torch.device, figure: Figure) -> None:
    def milliseconds(begin: PrefetchStream | None) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for batch in TeacherPrefetcher(BatchLoader(_batches(gpu)), begin):
            if begin is None:
                _late(batch)
            torch.cuda._sleep(LONG)
        assert not torch.cuda.current_stream().query()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    alone, beside = milliseconds(None), milliseconds(PrefetchStream(gpu, _late))
    figure("share of the time of one after the other", beside / alone)
    assert beside < 0.7 * alone


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_losses_are_those_of_the_step_one_after_the_other(stage: str, most: Seen, figure: Figure) -> None:
    """With sharded teachers, two micro batches a step."""
    figure("ranks", len(most))
    for rank in most:
        # Atomic additions of the backward passes have another order in each run, and each step enlarges the rounding.
        # Losses from the features of another batch differ by percents.
        assert rank[f"ahead, {stage}"] == pytest.approx(rank[f"fp32, {stage}"], rel=1e-4)
