"""Losses in float32 and fp16, and loss scaling."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from .conftest import Figure, Seen, launch
from .gpu_ranks import POISONED

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

STAGES = ["zero1", "zero2", "zero3"]


def test_the_gpu_gives_the_losses_of_the_cpu(one: Seen, tmp_path: Path, figure: Figure) -> None:
    (cpu,) = launch("cpu", 1, tmp_path / "out")
    reference = cpu["fp32, zero1"]
    assert max(reference) - min(reference) > 0.05
    apart = max(abs(a / b - 1) for a, b in zip(one[0]["fp32, zero1"], reference, strict=True))
    figure("largest relative difference", apart)
    assert apart < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_stays_near_float32(stage: str, most: Seen, figure: Figure) -> None:
    figure("ranks", len(most))
    assert most[0][f"fp16, {stage}"] == pytest.approx(most[0]["fp32, zero1"], rel=3e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_skips_the_step_and_halves_the_scale(stage: str, most: Seen, figure: Figure) -> None:
    figure("ranks", len(most))
    for rank in most:
        seen = rank[f"overflow, {stage}"]
        scales = seen["scales"]
        figure("scales", " ".join(f"{scale:g}" for scale in scales))
        assert seen["skipped"] == POISONED
        assert not seen["moved by overflows"]
        # DeepSpeed lets the first overflow pass (its hysteresis); from the second one on each halves the scale.
        assert scales[1] in (scales[0], scales[0] / 2)
        assert all(after == before / 2 for before, after in pairwise(scales[1:]))
        assert seen["moves afterwards"]
        assert seen["loss afterwards"] < float("inf")
