"""Tests of the shipped recipes: each has a head, resolves for common numbers of ranks, and builds its models."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import torch
import yaml

from mvd_scale.config import (
    DetectionRecipe,
    FinetuneRecipe,
    list_recipes,
    load_any_recipe,
    load_detection_recipe,
    load_finetune_recipe,
    load_recipe,
)
from mvd_scale.config.deepspeed import check_deepspeed_config
from mvd_scale.models import Classifier, Student
from mvd_scale.models.detector import Detector
from mvd_scale.targets import build_targets
from mvd_scale.targets.build import init_teacher

FINETUNED = [name for name in list_recipes() if isinstance(load_any_recipe(name), FinetuneRecipe)]
DETECTING = [name for name in list_recipes() if isinstance(load_any_recipe(name), DetectionRecipe)]
PRETRAINED = [name for name in list_recipes() if name not in FINETUNED + DETECTING]
PUBLISHED = [name for name in list_recipes() if not name.startswith("quickstart/") and name != "finetune/own_videos"]


def text_of(name: str) -> str:
    return (resources.files("mvd_scale") / "recipes" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", list_recipes())
def test_a_head_states_command_hardware_time_and_result(name: str) -> None:
    title, _, *head = [line for line in text_of(name).splitlines() if line.startswith("#")]
    words = {line.split()[1] for line in head if not line.startswith("#  ")}
    assert words >= {"command", "hardware", "time", "published"}
    assert len(title) > 20
    assert f"--recipe {name}" in text_of(name)


@pytest.mark.parametrize("name", [*FINETUNED, *DETECTING])
def test_a_head_tests_the_last_weights_and_names_no_test_list_as_validation(name: str) -> None:
    """Published figures are of the last epoch, a run folder; the test list would choose its best.safetensors."""
    head = "".join(line for line in text_of(name).splitlines() if line.startswith("#"))
    command = head[head.index("command ") : head.index("hardware ")]
    assert "--validation" not in command
    assert "best.safetensors" not in command
    if name.startswith("quickstart/"):
        return
    folder = load_any_recipe(name).run.folder
    assert f"evaluate {folder} " in command
    assert f"--out {folder}/test" in command


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_resolves_for_any_usual_number_of_ranks(name: str) -> None:
    recipe = load_any_recipe(name)
    for world_size in (1, 8, 32, 64):
        micro, accumulation = recipe.micro_batch_and_accumulation(world_size)
        assert micro * accumulation * world_size == recipe.training.global_batch
        assert micro <= (recipe.training.micro_batch or micro)
        check_deepspeed_config(recipe, world_size)


@pytest.mark.parametrize("name", PRETRAINED)
def test_its_models_fit_each_other(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        targets = build_targets(recipe, lambda target: init_teacher(recipe, target))
        student = Student.from_recipe(recipe, targets)
        batch = 2
        model = recipe.model
        pixels = torch.zeros(batch, model.frames, model.input_size, model.input_size, 3)
        visible = torch.zeros(batch, recipe.visible_tokens, dtype=torch.int64)
        masked = torch.zeros(batch, recipe.tokens - recipe.visible_tokens, dtype=torch.int64)
        predictions = student(pixels, visible, masked)
    for target, made in targets.items():
        tokens = {"masked": masked, "visible": visible}.get(recipe.targets[target].tokens, visible).shape[1]
        tokens += visible.shape[1] if recipe.targets[target].visible_weight else 0
        assert predictions[target].shape == (batch, tokens, made.channels)


@pytest.mark.parametrize("name", FINETUNED)
def test_its_classifier_builds(name: str) -> None:
    recipe = load_finetune_recipe(name)
    model = recipe.model
    with torch.device("meta"):
        pixels = torch.zeros(2, model.frames, model.input_size, model.input_size, 3)
        assert Classifier(model, 11)(pixels).shape == (2, 11)


@pytest.mark.parametrize("name", DETECTING)
def test_its_detector_builds(name: str) -> None:
    pytest.importorskip("torchvision", reason="needs torchvision: the detection extra")
    recipe = load_detection_recipe(name)
    with torch.device("meta"):
        model = Detector(recipe.model, recipe.detector)
    assert model.head.out_features == recipe.detector.classes


@pytest.mark.parametrize("name", list_recipes())
def test_crops_are_resized_as_in_the_published_code_of_their_stage(name: str) -> None:
    """PIL antialiases where pre-training shrinks a crop; torch and OpenCV do not in fine-tuning and detection."""
    crop = load_any_recipe(name).data.crop
    assert crop.antialias == (name in PRETRAINED)


@pytest.mark.parametrize(
    ("load", "name"), [(load_finetune_recipe, "finetune/b_k400"), (load_recipe, "distill/b_from_b")]
)
def test_a_recipe_that_does_not_mention_antialiasing_gets_that_of_its_stage(load: Any, name: str) -> None:
    published = load(name)
    values = yaml.safe_load(published.to_yaml())
    for crop in (published.data.crop.model_dump(exclude={"antialias"}), {"kind": "center"}):
        recipe = type(published).model_validate(values | {"data": values["data"] | {"crop": crop}})
        assert recipe.data.crop.antialias == published.data.crop.antialias
    for wanted in (False, True):
        crop = f"{{kind: {published.data.crop.kind}, antialias: {str(wanted).lower()}}}"
        assert load(name, ["--data.crop", crop]).data.crop.antialias is wanted


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = [load_any_recipe(name).run.folder for name in list_recipes()]
    assert len(set(folders)) == len(folders)
