"""The step of every recipe of pre-training on a fake GPU: no tensor on the wrong device, no dtype that does not meet
another, no wait of the host for the device, in the forward and the backward pass."""

from __future__ import annotations

import pytest
import torch

from mvd_kernels import attention_backend
from mvd_scale.config import Recipe, list_recipes, load_any_recipe, load_recipe
from mvd_scale.config.training import Checkpointing

from .flash_attention import flash_attention_2
from .gpu import GPU, fake_gpu
from .launches import recorded, unknown
from .steps import each_once, pretraining_step

RECIPES = {name: recipe for name in list_recipes() if isinstance(recipe := load_any_recipe(name), Recipe)}

BLOCKS = 2
"""Blocks of each stack in quick tests: the first, and the last, which gives fewer tokens."""


@pytest.mark.parametrize("name", each_once(RECIPES))
def test_the_step_of_a_recipe_runs_on_a_gpu(name: str) -> None:
    """And launches no kernel that is not in the table of registers and spills."""
    with fake_gpu(), recorded() as launches:
        step = pretraining_step(RECIPES[name], depth=BLOCKS)
        step.backward(step.forward())
    assert launches
    assert not unknown(launches)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("batched", [True, False], ids=["together", "apart"])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
def test_decoders_together_or_apart_with_any_checkpointing(
    precision: str, batched: bool, checkpointing: Checkpointing
) -> None:
    recipe = load_recipe("distill/b_from_b", ["--training.precision", precision])
    with fake_gpu():
        step = pretraining_step(recipe, depth=BLOCKS, checkpointing=checkpointing, batched=batched)
        step.backward(step.forward())


@pytest.mark.parametrize("checkpointing", ["none", "attention", "block"])
def test_flash_attention_in_place_of_torchs(checkpointing: Checkpointing) -> None:
    with fake_gpu(), flash_attention_2():
        assert attention_backend(GPU, torch.float16) == "flash-attn-2"
        step = pretraining_step(RECIPES["distill/b_from_b"], depth=BLOCKS, checkpointing=checkpointing)
        step.backward(step.forward())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill/s_from_l", "distill/b_from_l", "distill/l_from_l", "distill/h_from_h"])
def test_whole_models_of_every_size(name: str) -> None:
    with fake_gpu():
        step = pretraining_step(RECIPES[name])
        step.backward(step.forward())
