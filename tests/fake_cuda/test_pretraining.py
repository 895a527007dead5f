"""The step of every recipe of pre-training on a fake GPU: no tensor on the wrong device, no dtype that does not meet
another, no wait of the host for the device, in the forward and the backward pass."""

from __future__ import annotations

import pytest

from mvd_scale.config import Recipe, list_recipes, load_any_recipe

from .gpu import fake_gpu
from .steps import pretraining_step

RECIPES = {name: recipe for name in list_recipes() if isinstance(recipe := load_any_recipe(name), Recipe)}


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_of_a_recipe_runs_on_a_gpu(name: str) -> None:
    with fake_gpu():
        step = pretraining_step(RECIPES[name], depth=2)
        step.backward(step.forward())
