"""Runs of `bench students`: that of all students has features at all tokens, that of one only those that it needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvd_scale.config import load_recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.performance.benchmarks import students

CPU = Ranks(0, 0, 1, torch.device("cpu"))


def test_a_run_of_one_student_is_that_of_its_own_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--students", "{own: {data: {mask: {ratio: 0.5}}}, shared: {}}", "--training.precision", "fp32"]
    recipe = load_recipe("quickstart/student", words)
    asked: list[int | None] = []

    def prefetcher(*_: Any, all_tokens: int | None) -> None:
        asked.append(all_tokens)

    monkeypatch.setattr(students, "make_prefetcher", prefetcher)
    monkeypatch.setattr(students, "distillation_models", lambda parts, *_, **__: parts)
    monkeypatch.setattr(students, "Trainer", lambda _, batches, *__: SimpleNamespace(batch=next(batches)))
    runs: dict[str, Any] = students._make_runs(recipe, CPU)
    assert asked == [recipe.tokens, None, None]
    together = runs[""].batch
    assert together.own_visible.keys() == {"own"}
    for name in recipe.students:
        alone = runs[name].batch
        assert not alone.own_visible
        assert torch.equal(alone.masked, together.seen_by(name).masked)
