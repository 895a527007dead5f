"""`bench teachers` of a recipe whose features are standardised."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvd_scale.performance.batches import random_batch
from mvd_scale.performance.benchmarks import teachers
from mvd_scale.targets.statistics import FeatureStatistics


def test_statistics_are_on_the_device_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    monkeypatch.setattr(FeatureStatistics, "to", lambda _, device: moved.append(device))
    monkeypatch.setattr(teachers, "load_source", lambda *_: None)
    monkeypatch.setattr(teachers, "with_clips", lambda data, _: data)
    monkeypatch.setattr(teachers, "first_clip", lambda _, recipe, __, device: random_batch(recipe, 1, device))
    monkeypatch.setitem(teachers.PRECISIONS, "cpu", ("fp32", "bf16"))
    words = ["--device", "cpu", "--targets.video.norm", "false", "--targets.video.standardize", "layer"]
    report = teachers.measure_teachers("quickstart/student", words, steps=1)
    assert moved == [torch.device("cpu")]
    assert len(report.figures) == 4
    assert all(abs(figure.loss_change) < 0.1 for figure in report.figures)
