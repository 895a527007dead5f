"""Tests of the shipped recipes: each resolves for common numbers of ranks, and has the published values."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import torch
import yaml

from mvd_scale.config import (
    DecoderConfig,
    DetectionRecipe,
    FinetuneRecipe,
    ImageTeacherTarget,
    MomentumTarget,
    PixelTarget,
    Recipe,
    ShortSideCrop,
    VideoTeacherTarget,
    list_recipes,
    load_any_recipe,
    load_detection_recipe,
    load_finetune_recipe,
    load_recipe,
)
from mvd_scale.config.deepspeed import check_deepspeed_config
from mvd_scale.config.finetune import MixConfig
from mvd_scale.models import Classifier, Student
from mvd_scale.models.detector import Detector
from mvd_scale.targets import build_targets
from mvd_scale.targets.build import init_teacher

FINETUNED = [name for name in list_recipes() if isinstance(load_any_recipe(name), FinetuneRecipe)]
DETECTING = [name for name in list_recipes() if isinstance(load_any_recipe(name), DetectionRecipe)]
PRETRAINED = [name for name in list_recipes() if name not in FINETUNED + DETECTING]
PUBLISHED = [name for name in list_recipes() if not name.startswith("quickstart/") and name != "finetune/own_videos"]
DISTILLED = [name for name in PUBLISHED if name.startswith("distill/")]


def text_of(name: str) -> str:
    return (resources.files("mvd_scale") / "recipes" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", list_recipes())
def test_a_head_states_command_hardware_time_and_result(name: str) -> None:
    title, _, *head = [line for line in text_of(name).splitlines() if line.startswith("#")]
    words = {line.split()[1] for line in head if not line.startswith("#  ")}
    assert words >= {"command", "hardware", "time", "published"}
    assert len(title) > 20
    assert f"--recipe {name}" in text_of(name)


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


def targets_of(recipe: Recipe) -> list[type]:
    return sorted((type(target) for target in recipe.targets.values()), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("name", DISTILLED)
def test_distillation_is_as_published(name: str) -> None:
    recipe = load_recipe(name)
    student, _, teacher = name.removeprefix("distill/").removesuffix("_800").upper().split("_")
    training, data = recipe.training, recipe.data
    assert recipe.model.size == student
    assert targets_of(recipe) == [ImageTeacherTarget, VideoTeacherTarget]
    shape = {"S": (384, 2, 6), "B": (768, 2, 12), "L": (512, 4, 8), "H": (640, 8, 8)}[student]
    for target in recipe.targets.values():
        assert isinstance(target, ImageTeacherTarget | VideoTeacherTarget)
        assert target.model is not None
        assert target.model.size == teacher
        assert target.decoder == DecoderConfig(width=shape[0], depth=shape[1], heads=shape[2])
        assert (target.distance, target.weight, target.norm, target.tokens) == ("smooth_l1", 1, False, "masked")
    assert training.epochs == (800 if name.endswith("_800") else 400)
    assert training.global_batch == (512 if student in "LH" else 1024)
    assert training.min_lr == (1e-5 if student == "H" else 1e-4)
    assert recipe.model.drop_path == (0.2 if student == "H" else 0.1)
    assert training.gradient_checkpointing == ("block" if student == "H" else "none")
    assert (training.base_lr, training.betas, training.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)
    assert (training.warmup_epochs, training.clip_grad, training.precision) == (40, None, "fp16")
    assert data.mask is not None
    assert (data.mask.kind, data.mask.ratio, data.stride, data.flip, data.crop.kind) == ("tube", 0.9, 4, 0, "corner")
    assert (recipe.teachers.sharding == "zero3") == (teacher in "LH")
    image = recipe.targets["image"]
    assert isinstance(image, ImageTeacherTarget)
    assert image.model is not None
    assert (image.model.patch_size, image.model.input_size) == ((14, 196) if teacher == "H" else (16, 224))


@pytest.mark.parametrize("size", "sblh")
@pytest.mark.parametrize("dataset", ["k400", "ssv2", "ucf101"])
def test_video_teachers_are_as_published(size: str, dataset: str) -> None:
    recipe = load_recipe(f"pretrain/videomae_{size}_{dataset}")
    (pixels,) = recipe.targets.values()
    assert isinstance(pixels, PixelTarget)
    shape = {"s": (192, 4, 3), "b": (384, 4, 6), "l": (512, 12, 8), "h": (640, 12, 8)}[size]
    assert pixels.decoder == DecoderConfig(width=shape[0], depth=shape[1], heads=shape[2], embed_bias=False)
    assert (pixels.normalize, pixels.distance) == ("channel", "l2")
    small = dataset == "ucf101"
    training, mask = recipe.training, recipe.data.mask
    assert mask is not None
    assert (mask.kind, mask.ratio) == ("tube", 0.75 if small else 0.9)
    assert recipe.data.stride == (2 if dataset == "ssv2" else 4)
    assert (recipe.data.crop.kind, recipe.data.flip) == ("corner", 0)
    assert training.global_batch == (192 if small else {"s": 2048, "b": 2048, "l": 512, "h": 1024}[size])
    assert (training.base_lr, training.min_lr) == (3e-4 if small else 1.5e-4, 1e-5)
    assert training.epochs == (3200 if small else 1600)
    assert (recipe.model.positions, recipe.model.drop_path) == ("sinusoid", 0)


@pytest.mark.parametrize("size", "blh")
def test_image_teachers_are_as_published(size: str) -> None:
    recipe = load_recipe(f"pretrain/mae_{size}")
    (pixels,) = recipe.targets.values()
    assert isinstance(pixels, PixelTarget)
    assert pixels.decoder == DecoderConfig(width=512, depth=8, heads=16)
    assert pixels.normalize == "patch"
    crop, mask = recipe.data.crop, recipe.data.mask
    assert mask is not None
    assert (crop.kind, crop.interpolation, recipe.data.flip) == ("random_resized", "bicubic", 0.5)
    assert (mask.kind, mask.ratio) == ("random", 0.75)
    assert (recipe.training.global_batch, recipe.training.epochs) == (4096, 1600)
    assert recipe.model.patch_size == (14 if size == "h" else 16)


@pytest.mark.parametrize(
    ("name", "kinds", "epochs"),
    [
        ("image_teacher_s", [ImageTeacherTarget], 400),
        ("image_teacher_b", [ImageTeacherTarget], 400),
        ("video_teacher_s", [VideoTeacherTarget], 400),
        ("video_teacher_b", [VideoTeacherTarget], 400),
        ("image_teacher_s_300", [ImageTeacherTarget], 300),
        ("image_teacher_pixels_s", [ImageTeacherTarget, PixelTarget], 300),
        ("co_teaching_s_300", [ImageTeacherTarget, VideoTeacherTarget], 300),
        ("co_teaching_pixels_s", [ImageTeacherTarget, PixelTarget, VideoTeacherTarget], 300),
        ("momentum_b", [MomentumTarget], 800),
        ("momentum_b_in1k", [MomentumTarget], 800),
        ("momentum_b_from_in1k", [MomentumTarget], 800),
        ("per_token_b", [VideoTeacherTarget], 400),
    ],
)
def test_an_ablation_differs_in_its_targets(name: str, kinds: list[type], epochs: int) -> None:
    recipe = load_recipe(f"ablations/{name}")
    assert targets_of(recipe) == kinds
    assert recipe.training.epochs == epochs


@pytest.mark.parametrize(
    ("name", "batch", "lr", "epochs", "drop_path", "dropout", "views"),
    [
        ("s_k400", 16 * 12 * 2, 5e-4, 150, 0.1, 0, (5, 3)),
        ("b_k400", 32 * 6 * 2, 5e-4, 75, 0.1, 0, (5, 3)),
        ("l_k400", 32 * 2 * 8, 1e-3, 50, 0.3, 0.5, (5, 3)),
        ("h_k400", 32 * 8, 1e-3, 50, 0.3, 0.5, (5, 3)),
        ("s_ssv2", 32 * 12, 1e-3, 40, 0.1, 0, (2, 3)),
        ("b_ssv2", 16 * 24, 5e-4, 30, 0.1, 0, (2, 3)),
        ("l_ssv2", 16 * 16, 5e-4, 30, 0.3, 0.5, (2, 3)),
        ("h_ssv2", 16 * 8, 5e-4, 30, 0.3, 0.5, (2, 3)),
        ("b_ucf101", 8 * 16, 5e-4, 100, 0.2, 0.5, (5, 3)),
        ("b_hmdb51", 8 * 16, 5e-4, 100, 0.2, 0.5, (5, 3)),
    ],
)
def test_fine_tuning_is_as_published(
    name: str, batch: int, lr: float, epochs: int, drop_path: float, dropout: float, views: tuple[int, int]
) -> None:
    recipe = load_finetune_recipe(f"finetune/{name}")
    training, data = recipe.training, recipe.data
    assert (recipe.lr_batch, training.global_batch, data.copies) == (batch, 2 * batch, 2)
    assert (training.base_lr, training.epochs, training.warmup_epochs) == (lr, epochs, 5)
    assert training.min_lr == (1e-5 if name in {"h_ssv2", "b_ucf101", "b_hmdb51"} else 1e-6)
    assert training.layer_decay == (0.7 if name in {"s_ssv2", "b_ucf101", "b_hmdb51"} else 0.75)
    assert training.gradient_checkpointing == ("block" if name in {"h_k400", "b_ssv2", "l_ssv2", "h_ssv2"} else "none")
    assert (training.betas, training.weight_decay) == ((0.9, 0.999), 0.05)
    assert (recipe.model.drop_path, recipe.classifier.dropout) == (drop_path, dropout)
    assert (recipe.classifier.label_smoothing, recipe.classifier.init_scale) == (0.1, 0.001)
    assert recipe.classifier.classes == {"k400": 400, "ssv2": 174, "ucf101": 101, "hmdb51": 51}[name[2:]]
    assert recipe.mix == MixConfig(mixup=0.8, cutmix=1.0, switch=0.5)
    ssv2 = name.endswith("ssv2")
    assert (data.flip, data.sampling) == ((0, "segments") if ssv2 else (0.5, "window"))
    assert (data.crop.kind, data.crop.area, data.crop.antialias) == ("random_resized", (0.08, 1.0), False)
    randomly = data.augment.rand_augment
    assert (randomly.operations, randomly.magnitude, randomly.deviation) == (4, 7, 0.5)
    assert data.augment.erasing.probability == 0.25
    assert (recipe.test.sampling, recipe.test.clips, recipe.test.crops) == ("uniform" if ssv2 else "dense", *views)


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


@pytest.mark.parametrize(
    ("size", "lr", "epochs", "layer_decay"), [("b", 2.5e-4, 30, 0.75), ("l", 2.5e-4, 30, 0.75), ("h", 5e-4, 20, 0.8)]
)
def test_detection_is_as_published(size: str, lr: float, epochs: int, layer_decay: float) -> None:
    recipe = load_detection_recipe(f"detection/{size}_ava")
    training, data, detector = recipe.training, recipe.data, recipe.detector
    assert recipe.model.size == size.upper()
    assert (training.base_lr, training.epochs, training.layer_decay) == (lr, epochs, layer_decay)
    assert (recipe.lr_batch, training.warmup_epochs, training.min_lr) == (128, 5, 1e-6)
    assert (training.betas, training.weight_decay, training.ema_decay) == ((0.9, 0.999), 0.05, None)
    assert training.gradient_checkpointing == ("none" if size == "b" else "block")
    assert (recipe.model.frames, data.stride, recipe.model.input_size) == (16, 4, 224)
    assert (recipe.model.drop_path, detector.dropout, detector.init_scale) == (0.2, 0, 0.001)
    assert (detector.classes, detector.resolution, detector.widen) == (80, 7, (0.1, 0.05))
    assert data.crop == ShortSideCrop(sides=(256, 256), antialias=False)
    assert data.flip == 0.5
    assert recipe.key_frames.jitter == (0.2, 0.1, 0.1, 0.05)


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = [load_any_recipe(name).run.folder for name in list_recipes()]
    assert len(set(folders)) == len(folders)
