"""Batches whose features are computed one batch ahead, with a stand-in for the side stream of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mvd_scale.config.target import DecoderConfig, PixelTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.targets import MaskedDistillation, Target
from mvd_scale.training.placement import Decision
from mvd_scale.training.teachers import prefetch as ahead_module
from mvd_scale.training.teachers.prefetch import BatchStarter, TeacherPrefetcher, make_prefetcher

STEPS = 4
PLAIN = PixelTarget(decoder=DecoderConfig(width=1, depth=1, heads=1), distance="l1")


class Loader:
    """Batch k has pixels k; videos of batch 2 cannot be decoded."""

    def __init__(self, log: list[str], start: int = 0) -> None:
        self.log, self.next, self.substituted = log, start, 0

    def __next__(self) -> ClipBatch:
        if self.next == STEPS:
            raise StopIteration
        self.log.append(f"load {self.next}")
        self.substituted += 3 * (self.next == 2)
        empty = torch.zeros(1, 1, dtype=torch.int64)
        batch = ClipBatch(torch.full((1, 1, 2), float(self.next)), empty, empty, empty[0], empty[0])
        self.next += 1
        return batch


class Teacher(Target):
    """Its features are the pixels times a weight."""

    def __init__(self, name: str, log: list[str], *, moves: bool) -> None:
        super().__init__(PLAIN)
        self.name, self.log, self.prefetchable, self.weight = name, log, not moves, 1.0

    def raw_features(self, batch: ClipBatch) -> Tensor:
        self.log.append(f"{self.name} {int(batch.pixels[0, 0, 0])}")
        return self.weight * batch.pixels


def aside(teach: Callable[[ClipBatch], ClipBatch], log: list[str]) -> BatchStarter:
    """As `PrefetchStream`, on the CPU."""

    def begin(fetch: Callable[[], ClipBatch]) -> Callable[[], ClipBatch]:
        batch = teach(fetch())

        def wait_ready() -> ClipBatch:
            log.append(f"use {int(batch.pixels[0, 0, 0])}")
            return batch

        return wait_ready

    return begin


def train(*, ahead: bool, start: int = 0, end: int = STEPS) -> tuple[list[float], list[str]]:
    """Losses and what happened; the moving teacher's weight is the number of steps done."""
    log: list[str] = []
    moving = Teacher("moving", log, moves=True)
    objective = MaskedDistillation({"fixed": Teacher("fixed", log, moves=False), "moving": moving})
    batches = TeacherPrefetcher(Loader(log, start), aside(objective.prefetch_features, log) if ahead else None)
    moving.weight, losses = start, []

    def student(pixels: Tensor, *_: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(objective.targets, 100 + 7 * pixels)

    for step in range(start, end):
        batch = next(batches)
        assert int(batch.pixels[0, 0, 0]) == step
        losses.append(float(objective(student, batch)[0]))
        moving.weight = step + 1
        log.append(f"step {step}")
    return losses, log


def test_the_teachers_of_the_next_batch_come_before_the_step_and_moving_ones_at_their_place() -> None:
    _, log = train(ahead=True)
    first = ["load 0", "fixed 0", "load 1", "fixed 1", "use 0", "moving 0", "step 0"]
    second = ["load 2", "fixed 2", "use 1", "moving 1", "step 1"]
    third = ["load 3", "fixed 3", "use 2", "moving 2", "step 2"]
    assert log == [*first, *second, *third, "use 3", "moving 3", "step 3"]


def test_without_a_side_stream_nothing_is_ahead() -> None:
    _, log = train(ahead=False)
    assert log == [f"{what} {k}" for k in range(STEPS) for what in ("load", "fixed", "moving", "step")]


def test_losses_are_the_same_ahead_and_after_a_restart() -> None:
    losses, _ = train(ahead=False)
    assert len(set(losses)) == STEPS
    assert train(ahead=True)[0] == losses
    # The batch that was begun when the run ended is loaded again.
    before, log = train(ahead=True, end=2)
    assert "load 2" in log
    assert before + train(ahead=True, start=2)[0] == losses


@pytest.mark.parametrize("ahead", [False, True])
def test_all_batches_come_and_then_no_more(ahead: bool) -> None:
    batches = TeacherPrefetcher(Loader([]), aside(lambda batch: batch, []) if ahead else None)
    assert [int(batch.pixels[0, 0, 0]) for batch in batches] == list(range(STEPS))
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("ahead", [False, True])
def test_replaced_clips_are_those_of_batches_that_were_used(ahead: bool) -> None:
    batches = TeacherPrefetcher(Loader([]), aside(lambda batch: batch, []) if ahead else None)
    counts = []
    for _ in batches:
        counts.append(batches.substituted)
    assert counts == [0, 0, 3, 3]


def test_waiting_is_for_the_loader_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]
    monkeypatch.setattr("mvd_scale.training.teachers.prefetch.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow(Loader):
        def __next__(self) -> ClipBatch:
            clock[0] += 5
            return super().__next__()

    def teach(batch: ClipBatch) -> ClipBatch:
        clock[0] += 100
        return batch

    batches, waited = TeacherPrefetcher(Slow([]), aside(teach, [])), []
    for _ in batches:
        waited.append(batches.waited)
    # For two batches at the beginning, for none at the end.
    assert waited == [10, 5, 5, 0]


def test_batches_are_begun_ahead_if_any_teacher_is_placed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "PrefetchStream", lambda device, teach: (device, teach))
    gpu = torch.device("cuda", 0)
    objective = MaskedDistillation({"fixed": Teacher("fixed", [], moves=False)})

    def begun(*prefetched: bool) -> Any:
        teachers = [SimpleNamespace(prefetch=Decision(early, "")) for early in prefetched]
        return make_prefetcher(objective, [SimpleNamespace(teachers=teachers)], gpu)  # type: ignore[list-item]

    assert begun() is None
    assert begun(False, False) is None
    assert begun(False, True) == (gpu, objective.prefetch_features)


def test_teachers_compute_once_for_several_students_and_moving_ones_for_each() -> None:
    log: list[str] = []
    fixed = Teacher("fixed", log, moves=False)
    moving = [Teacher(f"moving of {name}", log, moves=True) for name in ("a", "b")]
    objectives = [MaskedDistillation({"fixed": fixed, "moving": own}) for own in moving]
    placement: Any = SimpleNamespace(teachers=[SimpleNamespace(prefetch=Decision(False, ""))])
    begin = make_prefetcher(objectives[0], [placement, placement], torch.device("cpu"))
    batches = TeacherPrefetcher(Loader(log), begin)
    for _ in range(2):
        batch = next(batches)
        for objective in objectives:
            objective(lambda pixels, *_: dict.fromkeys(("fixed", "moving"), 3 * pixels), batch)  # type: ignore[arg-type]
    steps = [["load", "fixed", "moving of a", "moving of b"] for _ in range(2)]
    assert log == [f"{what} {step}" for step, names in enumerate(steps) for what in names]


def test_every_tensor_of_a_batch_crosses() -> None:
    empty: Any = torch.zeros(1)
    batch = ClipBatch(empty, empty, empty, empty, empty, {14: empty}, {"video": empty})
    seen: list[Tensor] = []
    copy = batch.map(lambda tensor: seen.append(tensor) or tensor + 1)
    assert len(seen) == 7
    assert copy.resized == {14: 1}
    assert copy.features == {"video": 1}
    assert copy.video_ids == 1
