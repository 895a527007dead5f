"""Tests of DeepSpeed configurations: the recipe sets "auto" values, and values that contradict it are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.config import Recipe
from mvd_scale.config.deepspeed import student_deepspeed_config, teacher_deepspeed_config, zero_stage
from mvd_scale.errors import UserError

from .test_recipe import TINY


def recipe(deepspeed: str, **training: Any) -> Recipe:
    return Recipe.model_validate({**TINY, "training": {**TINY["training"], "deepspeed": deepspeed, **training}})


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_shipped_files_are_filled_by_the_recipe(name: str, stage: int) -> None:
    config = student_deepspeed_config(recipe(name, micro_batch=2, precision="bf16", clip_grad=0.5), world_size=2)
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"]
    assert not config["fp16"]["enabled"]
    assert zero_stage(recipe(name)) == stage
    assert "auto" not in json.dumps(config)


def test_the_teachers_file_has_no_optimizer_and_spares_the_student() -> None:
    config = teacher_deepspeed_config("fp32", world_size=2)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["memory_efficient_linear"] is False
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, but the recipe requires 8"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but the recipe requires False"),
        ({"bf16": True}, "bf16 is True, expected a JSON object"),
        ({"zero_optimization": 5}, "zero_optimization is 5, expected a JSON object"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0, expected 1, 2 or 3"),
        ({"optimizer": {"type": "Adam"}}, "the recipe configures the optimizer; remove `optimizer`"),
    ],
)
def test_a_contradiction_is_an_error(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **values}))
    with pytest.raises(UserError, match=message):
        student_deepspeed_config(recipe(str(file)), world_size=1)


def test_a_value_that_agrees_may_stand(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 8}))
    assert student_deepspeed_config(recipe(str(file)), world_size=1)["train_batch_size"] == 8


def test_an_unknown_file_lists_the_shipped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="zero1, zero2, zero3"):
        student_deepspeed_config(recipe("zero4"), world_size=1)
    file = tmp_path / "ds.json"
    file.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        student_deepspeed_config(recipe(str(file)), world_size=1)
    file.write_text("{}")
    with pytest.raises(UserError, match="expected 1, 2 or 3"):
        zero_stage(recipe(str(file)))
