"""Phases of a save in which the watchdog ends a run whose shared folder hangs, but none whose disk is slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mvd_scale.config import RunRecipe
from mvd_scale.config.training import CheckpointConfig
from mvd_scale.distributed.health.progress import WRITING_PATIENCE, Position
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.training.checkpointing import checkpointer as module
from mvd_scale.training.checkpointing.checkpointer import Checkpointer


@pytest.fixture
def checkpointer() -> Checkpointer:
    """Checkpointer of a run without models, in the phase `forward` of a step."""
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    ranks.progress.enter("forward", 5)
    return Checkpointer([], cast(RunRecipe, SimpleNamespace(checkpoints=CheckpointConfig())), ranks, 1)


def test_making_room_for_a_checkpoint_has_a_limit(checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, dict[str, Any]]] = []

    def run(ranks: Ranks, name: str, work: Any, **options: Any) -> None:
        called.append((name, options))

    monkeypatch.setattr(module, "run_on_rank0", run)
    checkpointer.save(5)
    assert called == [("room for step 5", {"patience": WRITING_PATIENCE})]


def test_the_last_checkpoint_is_waited_for_as_patiently_as_for_any_other(
    checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Position] = []
    monkeypatch.setattr(checkpointer, "wait", lambda: seen.append(checkpointer.ranks.progress.position))
    checkpointer.wait_for_last()
    checkpointer.__exit__(None, None, None)
    assert [(at.phase, at.patience) for at in seen] == [("save", WRITING_PATIENCE)] * 2
    # An error that is raised next is that of the phase before.
    assert checkpointer.ranks.progress.position[3:6] == (1, 5, "forward")
