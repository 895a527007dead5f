"""Tests of DeepSpeed configurations: the recipe sets "auto" values, and values that contradict it are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.config import Recipe, load_any_recipe
from mvd_scale.config.deepspeed import (
    check_deepspeed_config,
    student_deepspeed_config,
    teacher_deepspeed_config,
    zero_stage,
)
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


@pytest.mark.parametrize("file", ["zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize(
    ("name", "power", "window", "hysteresis"),
    [
        ("pretrain/mae_b", 16, 2000, 1),
        ("pretrain/videomae_b_k400", 16, 2000, 1),
        ("distill/b_from_b", 16, 2000, 1),
        ("finetune/b_k400", 7, 128, 2),
        ("detection/b_ava", 16, 2000, 1),
    ],
)
def test_the_loss_scale_is_that_of_the_kind_of_recipe(
    name: str, power: int, window: int, hysteresis: int, file: str
) -> None:
    """torch's scaler where the published code uses it, DeepSpeed's with its own settings in fine-tuning."""
    made = load_any_recipe(name)
    training = made.training.model_copy(update={"deepspeed": file})
    fp16 = student_deepspeed_config(made.model_copy(update={"training": training}), world_size=8)["fp16"]
    assert fp16 == {
        "enabled": True, "loss_scale": 0, "initial_scale_power": power, "loss_scale_window": window,
        "hysteresis": hysteresis,
    }  # fmt: skip


def test_a_recipe_may_set_the_loss_scale() -> None:
    made = recipe("zero2", initial_scale_power=12, loss_scale_window=500, hysteresis=3)
    fp16 = student_deepspeed_config(made, world_size=1)["fp16"]
    assert (fp16["initial_scale_power"], fp16["loss_scale_window"], fp16["hysteresis"]) == (12, 500, 3)


def test_the_teachers_file_has_no_optimizer_and_spares_the_student() -> None:
    config = teacher_deepspeed_config("fp32", world_size=2)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["memory_efficient_linear"] is False
    assert config["zero_optimization"]["overlap_comm"] is True
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, but the recipe requires 8"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but the recipe requires False"),
        ({"fp16": {"loss_scale_window": 128}}, "fp16.loss_scale_window is 128, but the recipe requires 2000"),
        ({"fp16": {"hysteresis": 2}}, "fp16.hysteresis is 2, but the recipe requires 1"),
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


def test_states_on_nvme_are_refused_before_a_run_begins(tmp_path: Path) -> None:
    file = tmp_path / "nvme.json"
    states = {"device": "nvme", "nvme_path": "/mnt/nvme"}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": states}}))
    with pytest.raises(UserError, match=r"offload_optimizer\.device is 'nvme', .* be resumed .* expected 'cpu'"):
        check_deepspeed_config(recipe(str(file)), world_size=1)
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": None}}))
    with pytest.raises(UserError, match="offload_optimizer is None, expected a JSON object"):
        check_deepspeed_config(recipe(str(file)), world_size=1)
    states["device"] = "cpu"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": states}}))
    check_deepspeed_config(recipe(str(file)), world_size=1)
