"""What a recipe needs of hosts: room for checkpoints, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.config import load_finetune_recipe, load_recipe
from mvd_scale.doctor.checks.recipe import checkpoint_bytes, files_exist, recipe_files
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder

PRETRAIN = """
run: {folder: unused}
device: cpu
model: {width: 48, depth: 2, heads: 3, frames: 4, input_size: 48, positions: sinusoid}
data: {stride: 2, clips_per_video: 2, mask: {ratio: 0.5}, source: videos, root: https://host/videos}
targets:
  pixels: {kind: pixels, decoder: {width: 32, depth: 1, heads: 2}}
training: {epochs: 6, global_batch: 4, micro_batch: 1, base_lr: 1e-2, warmup_epochs: 1, deepspeed: zero2}
checkpoints: {keep: 2}
"""


@pytest.fixture
def pretrain(tmp_path: Path) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(PRETRAIN)
    return str(file)


def count(module: object) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # type: ignore[attr-defined]


def test_checkpoints_hold_weights_and_two_moments(pretrain: str) -> None:
    recipe = load_recipe(pretrain)
    student = checkpoint_bytes(recipe) / 3 / 12  # two are kept, and one is written
    assert student == round(student)
    assert student > count(Encoder(recipe.model))
    assert checkpoint_bytes(load_recipe(pretrain, ["--checkpoints.keep", "5"])) == 6 * 12 * student


def test_a_momentum_target_adds_its_average(pretrain: str) -> None:
    plain = load_recipe(pretrain, ["--checkpoints.keep", "1"])
    target = "{kind: momentum, decoder: {width: 32, depth: 1, heads: 2}}"
    recipe = load_recipe(pretrain, ["--checkpoints.keep", "1", "--targets.own", target])
    without = load_recipe(pretrain, ["--checkpoints.keep", "1", "--targets.own", target.replace("momentum", "pixels")])
    assert checkpoint_bytes(recipe) > checkpoint_bytes(plain)
    averaged = sum(weight.numel() for name, weight in Encoder(plain.model).named_parameters() if name[:5] != "norm.")
    # The decoders differ in their last layer: so many values are predicted.
    decoders = abs(checkpoint_bytes(recipe) - checkpoint_bytes(without) - 2 * 4 * averaged) / 2 / 12
    assert decoders < 32 * 2 * 16 * 16 * 3 + 2 * 16 * 16 * 3


def test_an_average_of_fine_tuning_is_saved_too() -> None:
    words = ["--run.folder", "unused", "--classifier.classes", "10", "--checkpoints.keep", "1"]
    recipe = load_finetune_recipe("finetune/own_videos", words)
    parameters = count(Classifier(recipe.model, 10))
    assert checkpoint_bytes(recipe) == 2 * 12 * parameters
    averaged = load_finetune_recipe("finetune/own_videos", [*words, "--training.ema_decay", "0.999"])
    assert checkpoint_bytes(averaged) == 2 * 16 * parameters


def test_the_number_of_classes_is_needed() -> None:
    with pytest.raises(UserError, match=r"classifier\.classes is missing"):
        checkpoint_bytes(load_finetune_recipe("finetune/own_videos", ["--run.folder", "unused"]))


def test_files_of_a_recipe_are_those_that_are_no_urls_or_patterns(pretrain: str) -> None:
    recipe = load_recipe(pretrain, ["--training.initial_encoder", "encoder.safetensors"])
    assert recipe_files(recipe) == {
        "data.source": Path("videos"),
        "training.initial_encoder": Path("encoder.safetensors"),
    }
    assert recipe_files(load_recipe(pretrain, ["--data.source", "videos/*.mp4"])) == {}


def test_files_exist_or_are_named(tmp_path: Path) -> None:
    (finding,) = files_exist({"data.source": tmp_path})
    assert (finding.outcome, finding.detail) == ("ok", "1 exist: data.source")
    (finding,) = files_exist({"data.source": tmp_path, "targets.image.checkpoint": tmp_path / "mae.pth"})
    assert (finding.outcome, finding.detail) == ("fail", f"missing: targets.image.checkpoint {tmp_path / 'mae.pth'}")
    (finding,) = files_exist({})
    assert finding.outcome == "left out"
