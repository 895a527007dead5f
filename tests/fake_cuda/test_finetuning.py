"""The step of every recipe of fine-tuning and detection on a fake GPU, forward and backward, in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvd_scale.config import DetectionRecipe, FinetuneRecipe, list_recipes, load_any_recipe
from mvd_scale.config.training import Checkpointing
from mvd_scale.training.finetuning import classification_loss

from .flash_attention import flash_attention_2
from .gpu import fake_gpu
from .launches import recorded, unknown
from .steps import each_once, finetuning_step

RECIPES = {
    name: recipe
    for name in list_recipes()
    if isinstance(recipe := load_any_recipe(name), FinetuneRecipe | DetectionRecipe)
}
BLOCKS = 2


@pytest.fixture(autouse=True)
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips are mixed as by mixup, whose shares the host draws: there are no random numbers without values."""

    def mix(pixels: Tensor, targets: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        clips = pixels.float() / 255
        return torch.lerp(clips.flip(0), clips, 0.3), torch.lerp(targets.flip(0), targets, 0.3)

    monkeypatch.setattr(classification_loss, "mix_clips", mix)


def run(recipe: FinetuneRecipe | DetectionRecipe, checkpointing: Checkpointing) -> None:
    training = recipe.training.model_copy(update={"precision": "bf16"})
    step = finetuning_step(recipe.model_copy(update={"training": training}), depth=BLOCKS, checkpointing=checkpointing)
    step.backward(step.forward())


@pytest.mark.parametrize("name", each_once(RECIPES))
def test_the_step_of_a_recipe_runs_on_a_gpu(name: str) -> None:
    """And launches no kernel that is not in the table of registers and spills."""
    with fake_gpu(), recorded() as launches:
        run(RECIPES[name], RECIPES[name].training.gradient_checkpointing)
    assert launches
    assert not unknown(launches)


@pytest.mark.parametrize("flash", [False, True], ids=["SDPA", "flash-attn"])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
@pytest.mark.parametrize("name", ["finetune/b_k400", "detection/b_ava"])
def test_any_checkpointing_and_attention(name: str, checkpointing: Checkpointing, flash: bool) -> None:
    with fake_gpu():
        if not flash:
            run(RECIPES[name], checkpointing)
            return
        with flash_attention_2():
            run(RECIPES[name], checkpointing)
