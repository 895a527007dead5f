"""Checks of the stream on which teachers work one batch in advance. Needs torch on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mvd_scale.data.batch import ClipBatch
from mvd_scale.performance.batches import BatchLoader
from mvd_scale.training.teachers.prefetch import PrefetchStream, TeacherPrefetcher

BATCHES, NUMBERS = 8, 2**22

LONG = 50_000_000
"""Cycles for which a stream is kept busy: some hundredths of a second."""


def batches(gpu: torch.device) -> Iterator[ClipBatch]:
    """Yield `BATCHES` batches; batch k is full of k."""
    for k in range(BATCHES):
        full = torch.full((NUMBERS,), float(k), device=gpu)
        yield ClipBatch(full, full, full, full, torch.tensor(k))


def late(batch: ClipBatch) -> ClipBatch:
    """Add features that come long after the host has gone on."""
    torch.cuda._sleep(LONG)
    return replace(batch, features={"teacher": 2 * batch.pixels})


def early(batch: ClipBatch) -> ClipBatch:
    """Add features that come long before the student is done with those before them."""
    return replace(batch, features={"teacher": 2 * batch.pixels})


def read_by_student(gpu: torch.device, teach: Callable[[ClipBatch], ClipBatch], sleep: int) -> list[list[float]]:
    """Return least and largest value that the student reads: of pixels, then of features / 2, of each batch.

    Args:
        gpu: device of the batches.
        teach: function that the prefetch stream runs.
        sleep: cycles for which the student's stream is busy before it reads.
    """
    read: list[Tensor] = []
    for batch in TeacherPrefetcher(BatchLoader(batches(gpu)), PrefetchStream(gpu, teach)):
        if sleep:
            torch.cuda._sleep(sleep)
        read.append(torch.stack([batch.pixels.amin(), batch.pixels.amax()]))
        read.append(torch.stack([batch.features["teacher"].amin(), batch.features["teacher"].amax()]) / 2)
    values: list[list[float]] = torch.stack(read).tolist()
    return values


EXPECTED = [[float(k), float(k)] for k in range(BATCHES) for _ in range(2)]
"""Result of `read_by_student` if the streams are in order."""


def overlap(gpu: torch.device) -> tuple[float, bool]:
    """Return the time with the prefetch stream over that without, and whether the host ran ahead of the GPU."""
    alone, _ = _milliseconds(gpu, None)
    beside, ahead = _milliseconds(gpu, PrefetchStream(gpu, late))
    return beside / alone, ahead


def _milliseconds(gpu: torch.device, begin: PrefetchStream | None) -> tuple[float, bool]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(gpu)
    start.record()
    for batch in TeacherPrefetcher(BatchLoader(batches(gpu)), begin):
        if begin is None:
            late(batch)
        torch.cuda._sleep(LONG)
    ahead = not torch.cuda.current_stream(gpu).query()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), ahead
