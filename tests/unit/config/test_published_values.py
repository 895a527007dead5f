"""Resolved values of every shipped recipe of a published run, against tables of what was published.

The tables are written from the commands that the authors of MVD, VideoMAE (also its code for AVA) and MAE released and
from the tables of the paper, not from the recipes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from mvd_scale.config import (
    DecoderConfig,
    FinetuneRecipe,
    ImageTeacherTarget,
    MomentumTarget,
    PixelTarget,
    Recipe,
    ShortSideCrop,
    VideoTeacherTarget,
    list_recipes,
    load_detection_recipe,
    load_finetune_recipe,
    load_recipe,
)
from mvd_scale.config.data import CornerCrop, RandAugment, RandomErasing, RandomResizedCrop
from mvd_scale.config.finetune import MixConfig


class Distilled(NamedTuple):
    """Stage 2, from the commands of MVD."""

    student: str
    teachers: str
    batch: int
    """GPUs x clips x accumulation."""

    decoder: tuple[int, int, int]
    """Width, depth, heads."""

    min_lr: float
    drop_path: float
    epochs: int
    checkpointing: str


DISTILLED = {
    "s_from_b": Distilled("S", "B", 32 * 16 * 2, (384, 2, 6), 1e-4, 0.1, 400, "none"),
    "s_from_l": Distilled("S", "L", 32 * 16 * 2, (384, 2, 6), 1e-4, 0.1, 400, "none"),
    "b_from_b": Distilled("B", "B", 32 * 16 * 2, (768, 2, 12), 1e-4, 0.1, 400, "none"),
    "b_from_l": Distilled("B", "L", 32 * 8 * 4, (768, 2, 12), 1e-4, 0.1, 400, "none"),
    "l_from_l": Distilled("L", "L", 32 * 8 * 2, (512, 4, 8), 1e-4, 0.1, 400, "none"),
    "l_from_l_800": Distilled("L", "L", 32 * 8 * 2, (512, 4, 8), 1e-5, 0.1, 800, "none"),
    "h_from_h_800": Distilled("H", "H", 32 * 8 * 2, (640, 8, 8), 1e-5, 0.2, 800, "block"),
}

NOT_PUBLISHED = {
    "own_videos", "sb_from_b", "sbl_from_l", "b_from_dinov3_l_and_vjepa2_l", "l_from_dinov3_l_and_vjepa2_l",
    "b_from_dinov3_l_and_vjepa2_l_dense", "b_from_dinov3_l_and_vjepa2_l_balanced",
    "b_from_siglip2_l_and_vjepa2_l", "b_from_vjepa2_1_l",
}  # fmt: skip
"""Recipes of settings that no paper has: several students of one run, teachers of later years."""

UNPUBLISHED_LENGTHS = {
    "s_from_b_800": ("s_from_b", 800),
    "s_from_l_800": ("s_from_l", 800),
    "b_from_b_800": ("b_from_b", 800),
    "b_from_l_800": ("b_from_l", 800),
    "h_from_h": ("h_from_h_800", 400),
}
"""Recipes of stage 2 that were not published: the one that was, and their epochs, in which alone they differ."""


class VideoMae(NamedTuple):
    """Stage 1 of videos, from the commands of VideoMAE."""

    batch: int
    epochs: int
    base_lr: float
    stride: int
    mask: float


VIDEOMAE = {
    "s_k400": VideoMae(32 * 32, 1600, 1.5e-4, 4, 0.9),
    "b_k400": VideoMae(64 * 32, 1600, 1.5e-4, 4, 0.9),
    "l_k400": VideoMae(64 * 8, 1600, 1.5e-4, 4, 0.9),
    "h_k400": VideoMae(64 * 16, 1600, 1.5e-4, 4, 0.9),
    "s_ssv2": VideoMae(64 * 32, 2400, 1.5e-4, 2, 0.9),
    "b_ssv2": VideoMae(64 * 32, 2400, 1.5e-4, 2, 0.9),
    "b_ssv2_800": VideoMae(64 * 32, 800, 1.5e-4, 2, 0.9),
    "b_ucf101": VideoMae(8 * 24, 3200, 3e-4, 4, 0.75),
    # Not published: the values of their size on Kinetics-400 with those of their data.
    "l_ssv2": VideoMae(64 * 8, 2400, 1.5e-4, 2, 0.9),
    "h_ssv2": VideoMae(64 * 16, 2400, 1.5e-4, 2, 0.9),
    "s_ucf101": VideoMae(8 * 24, 3200, 3e-4, 4, 0.75),
    "l_ucf101": VideoMae(8 * 24, 3200, 3e-4, 4, 0.75),
    "h_ucf101": VideoMae(8 * 24, 3200, 3e-4, 4, 0.75),
}
VIDEOMAE_DECODERS = {"s": (192, 4, 3), "b": (384, 4, 6), "l": (512, 12, 8), "h": (640, 12, 8)}


class Finetuned(NamedTuple):
    """Stage 3, from the commands of MVD, and of VideoMAE for UCF101."""

    batch: int
    """GPUs x videos x accumulation, copies not counted."""

    base_lr: float
    min_lr: float
    layer_decay: float
    epochs: int
    drop_path: float
    dropout: float
    checkpointing: str


FINETUNED = {
    "s_k400": Finetuned(16 * 12 * 2, 5e-4, 1e-6, 0.75, 150, 0.1, 0.0, "none"),
    "b_k400": Finetuned(32 * 6 * 2, 5e-4, 1e-6, 0.75, 75, 0.1, 0.0, "none"),
    "l_k400": Finetuned(32 * 2 * 8, 1e-3, 1e-6, 0.75, 50, 0.3, 0.5, "none"),
    "h_k400": Finetuned(32 * 8, 1e-3, 1e-6, 0.75, 50, 0.3, 0.5, "block"),
    "s_ssv2": Finetuned(32 * 12, 1e-3, 1e-6, 0.7, 40, 0.1, 0.0, "none"),
    "b_ssv2": Finetuned(16 * 24, 5e-4, 1e-6, 0.75, 30, 0.1, 0.0, "block"),
    "l_ssv2": Finetuned(16 * 16, 5e-4, 1e-6, 0.75, 30, 0.3, 0.5, "block"),
    "h_ssv2": Finetuned(16 * 8, 5e-4, 1e-5, 0.75, 30, 0.3, 0.5, "block"),
    "b_ucf101": Finetuned(8 * 16, 5e-4, 1e-5, 0.7, 100, 0.2, 0.5, "none"),
    # Not published: the values of UCF101.
    "b_hmdb51": Finetuned(8 * 16, 5e-4, 1e-5, 0.7, 100, 0.2, 0.5, "none"),
}
CLASSES = {"k400": 400, "ssv2": 174, "ucf101": 101, "hmdb51": 51}


class Detected(NamedTuple):
    """AVA v2.2, from the commands of VideoMAE's code for it."""

    batch: int
    base_lr: float
    epochs: int
    layer_decay: float
    checkpointing: str


DETECTED = {
    "b_ava": Detected(32 * 4, 2.5e-4, 30, 0.75, "none"),
    "b_ava_k400": Detected(32 * 4, 5e-4, 30, 0.75, "none"),
    "l_ava": Detected(32 * 4, 2.5e-4, 30, 0.75, "block"),
    "l_ava_k400": Detected(32 * 4, 5e-4, 20, 0.8, "block"),
    "h_ava": Detected(64 * 2, 5e-4, 20, 0.8, "block"),
}

ABLATIONS: dict[str, tuple[list[type], int]] = {
    # Table 1
    "image_teacher_s": ([ImageTeacherTarget], 400),
    "image_teacher_b": ([ImageTeacherTarget], 400),
    "video_teacher_s": ([VideoTeacherTarget], 400),
    "video_teacher_b": ([VideoTeacherTarget], 400),
    # Table 7
    "image_teacher_s_300": ([ImageTeacherTarget], 300),
    "image_teacher_pixels_s": ([ImageTeacherTarget, PixelTarget], 300),
    "co_teaching_s_300": ([ImageTeacherTarget, VideoTeacherTarget], 300),
    "co_teaching_pixels_s": ([ImageTeacherTarget, PixelTarget, VideoTeacherTarget], 300),
    # Table 8
    "momentum_b": ([MomentumTarget], 800),
    "momentum_b_in1k": ([MomentumTarget], 800),
    "momentum_b_from_in1k": ([MomentumTarget], 800),
    # Table 9
    "per_token_b": ([VideoTeacherTarget], 400),
}

RESULTS = {
    "distill/s_from_b": ["80.6", "70.7"],
    "distill/s_from_l": ["81.0", "70.9"],
    "distill/b_from_b": ["82.7", "72.5"],
    "distill/b_from_l": ["83.4", "73.7"],
    "distill/l_from_l": ["86.0", "76.1"],
    "distill/l_from_l_800": ["86.4", "76.7"],
    "distill/h_from_h_800": ["87.3", "77.3"],
    "pretrain/videomae_s_k400": ["79.0", "66.4"],
    "pretrain/videomae_b_k400": ["81.5", "69.7", "81.0"],
    "pretrain/videomae_l_k400": ["85.2", "74.0"],
    "pretrain/videomae_h_k400": ["86.6"],
    "pretrain/videomae_s_ssv2": ["66.8"],
    "pretrain/videomae_b_ssv2": ["70.8"],
    "pretrain/videomae_b_ssv2_800": ["69.6"],
    "pretrain/videomae_l_ssv2": ["none"],
    "pretrain/videomae_h_ssv2": ["none"],
    "pretrain/videomae_b_ucf101": ["91.3"],
    "finetune/s_k400": ["80.6", "81.0"],
    "finetune/b_k400": ["82.7", "83.4"],
    "finetune/l_k400": ["86.0", "86.4"],
    "finetune/h_k400": ["87.3"],
    "finetune/s_ssv2": ["70.7", "70.9"],
    "finetune/b_ssv2": ["72.5", "73.7"],
    "finetune/l_ssv2": ["76.1", "76.7"],
    "finetune/h_ssv2": ["77.3"],
    "finetune/b_ucf101": ["97.0", "97.5"],
    "finetune/b_hmdb51": ["76.4", "79.7"],
    "detection/b_ava": ["29.3", "31.1"],
    "detection/b_ava_k400": ["33.6", "34.2"],
    "detection/l_ava": ["37.7"],
    "detection/l_ava_k400": ["38.7"],
    "detection/h_ava": ["40.1", "41.1"],
    "ablations/image_teacher_s": ["80.4", "69.4"],
    "ablations/image_teacher_b": ["82.3", "71.4"],
    "ablations/video_teacher_s": ["80.1", "70.0"],
    "ablations/video_teacher_b": ["82.1", "71.8"],
    "ablations/image_teacher_s_300": ["68.7"],
    "ablations/image_teacher_pixels_s": ["67.9"],
    "ablations/co_teaching_s_300": ["70.1"],
    "ablations/co_teaching_pixels_s": ["69.0"],
    "ablations/momentum_b": ["80.5", "70.4"],
    "ablations/momentum_b_from_in1k": ["81.8", "70.8"],
    "ablations/per_token_b": ["80.9", "70.5"],
}
"""Figures that the head of a recipe states as published: top-1 on K400 and SSv2 or its own data; frame mAP of AVA."""


def test_every_recipe_of_a_published_kind_is_in_a_table() -> None:
    tables: dict[str, Any] = {
        "distill": DISTILLED | UNPUBLISHED_LENGTHS,
        "finetune": FINETUNED,
        "detection": DETECTED,
        "pretrain": {f"videomae_{name}": row for name, row in VIDEOMAE.items()}
        | dict.fromkeys(["mae_b", "mae_l", "mae_h"]),
    }
    for folder, table in tables.items():
        shipped = {name.removeprefix(f"{folder}/") for name in list_recipes() if name.startswith(f"{folder}/")}
        assert shipped - NOT_PUBLISHED == table.keys()


def test_heads_state_the_published_figures() -> None:
    from importlib import resources

    for name, figures in RESULTS.items():
        text = (resources.files("mvd_scale") / "recipes" / f"{name}.yaml").read_text()
        published = text[text.index("# published ") :].split("\nbase:")[0].split("\nrun:")[0].split("\n# note")[0]
        assert all(figure in published for figure in figures), name


def targets_of(recipe: Recipe) -> list[type]:
    return sorted((type(target) for target in recipe.targets.values()), key=lambda kind: kind.__name__)


def assert_pretraining(recipe: Recipe) -> None:
    """Check the values that all published pre-training has in common."""
    training = recipe.training
    assert (training.betas, training.weight_decay) == ((0.9, 0.95), 0.05)
    assert (training.warmup_epochs, training.clip_grad, training.precision) == (40, None, "fp16")
    assert recipe.checkpoints.every_epochs == 10


@pytest.mark.parametrize(("name", "row"), DISTILLED.items(), ids=DISTILLED)
def test_distillation_is_as_published(name: str, row: Distilled) -> None:
    recipe = load_recipe(f"distill/{name}")
    training, data, mask = recipe.training, recipe.data, recipe.data.mask
    assert_pretraining(recipe)
    assert (recipe.model.size, recipe.model.drop_path, recipe.model.positions) == (
        row.student,
        row.drop_path,
        "sincos3d",
    )
    assert (recipe.model.frames, recipe.model.tubelet, recipe.model.input_size) == (16, 2, 224)
    assert (training.global_batch, training.epochs) == (row.batch, row.epochs)
    assert (training.base_lr, training.min_lr) == (1.5e-4, row.min_lr)
    assert training.gradient_checkpointing == row.checkpointing
    assert targets_of(recipe) == [ImageTeacherTarget, VideoTeacherTarget]
    for target in recipe.targets.values():
        assert isinstance(target, ImageTeacherTarget | VideoTeacherTarget)
        assert target.model is not None
        assert target.model.size == row.teachers
        assert target.decoder == DecoderConfig(width=row.decoder[0], depth=row.decoder[1], heads=row.decoder[2])
        assert (target.distance, target.weight, target.norm, target.tokens) == ("smooth_l1", 1, False, "masked")
    assert mask is not None
    assert (mask.kind, mask.ratio, mask.decode_ratio) == ("tube", 0.9, 1)
    assert (data.sampling, data.stride, data.clips_per_video, data.copies, data.flip) == ("dense", 4, 1, 1, 0)
    assert data.crop == CornerCrop(scales=(1, 0.875, 0.75, 0.66), interpolation="bilinear")
    assert (data.augment.rand_augment, data.augment.color_jitter, data.augment.erasing) == (None, None, None)
    assert (recipe.teachers.sharding == "zero3") == (row.teachers in "LH")
    image, video = recipe.targets["image"], recipe.targets["video"]
    assert isinstance(image, ImageTeacherTarget)
    assert isinstance(video, VideoTeacherTarget)
    assert image.model is not None
    assert video.model is not None
    assert (image.model.patch_size, image.model.input_size) == ((14, 196) if row.teachers == "H" else (16, 224))
    assert (image.model.positions, image.model.class_token) == ("sincos2d", True)
    assert video.model.positions == "sinusoid"


@pytest.mark.parametrize(("name", "other"), UNPUBLISHED_LENGTHS.items(), ids=UNPUBLISHED_LENGTHS)
def test_an_unpublished_length_differs_in_its_epochs_alone(name: str, other: tuple[str, int]) -> None:
    ours, published = (load_recipe(f"distill/{part}").identity() for part in (name, other[0]))
    differing = {key for key in ours.keys() | published.keys() if ours.get(key) != published.get(key)}
    assert differing - {"run.folder"} == {"training.epochs"}
    assert ours["training.epochs"] == other[1]


@pytest.mark.parametrize(("name", "row"), VIDEOMAE.items(), ids=VIDEOMAE)
def test_video_teachers_are_as_published(name: str, row: VideoMae) -> None:
    recipe = load_recipe(f"pretrain/videomae_{name}")
    training, data, mask = recipe.training, recipe.data, recipe.data.mask
    assert_pretraining(recipe)
    (pixels,) = recipe.targets.values()
    assert isinstance(pixels, PixelTarget)
    width, depth, heads = VIDEOMAE_DECODERS[name[0]]
    assert pixels.decoder == DecoderConfig(width=width, depth=depth, heads=heads, embed_bias=False)
    assert (pixels.normalize, pixels.distance) == ("channel", "l2")
    assert (recipe.model.size, recipe.model.positions, recipe.model.drop_path) == (name[0].upper(), "sinusoid", 0)
    assert mask is not None
    assert (mask.kind, mask.ratio, mask.decode_ratio) == ("tube", row.mask, 1)
    assert (data.sampling, data.stride, data.flip, data.copies) == ("dense", row.stride, 0, 1)
    assert data.crop == CornerCrop()
    assert (training.global_batch, training.epochs) == (row.batch, row.epochs)
    assert (training.base_lr, training.min_lr) == (row.base_lr, 1e-5)


@pytest.mark.parametrize("size", "blh")
def test_image_teachers_are_as_published(size: str) -> None:
    recipe = load_recipe(f"pretrain/mae_{size}")
    training, mask = recipe.training, recipe.data.mask
    assert_pretraining(recipe)
    (pixels,) = recipe.targets.values()
    assert isinstance(pixels, PixelTarget)
    assert pixels.decoder == DecoderConfig(width=512, depth=8, heads=16)
    assert (pixels.normalize, pixels.distance) == ("patch", "l2")
    assert mask is not None
    assert (mask.kind, mask.ratio) == ("random", 0.75)
    assert recipe.data.crop == RandomResizedCrop(area=(0.2, 1.0), interpolation="bicubic")
    assert recipe.data.flip == 0.5
    assert (training.global_batch, training.epochs) == (4096, 1600)
    assert (training.base_lr, training.min_lr) == (1.5e-4, 0)
    assert (recipe.model.size, recipe.model.drop_path, recipe.model.class_token) == (size.upper(), 0, True)
    assert (recipe.model.patch_size, recipe.model.input_size) == (14 if size == "h" else 16, 224)


@pytest.mark.parametrize(("name", "row"), ABLATIONS.items(), ids=ABLATIONS)
def test_an_ablation_differs_in_its_targets(name: str, row: tuple[list[type], int]) -> None:
    recipe = load_recipe(f"ablations/{name}")
    assert targets_of(recipe) == row[0]
    assert recipe.training.epochs == row[1]
    if name == "momentum_b_in1k":
        return
    size = recipe.model.size
    assert size is not None
    ours, base = recipe.identity(), load_recipe(f"distill/{size.lower()}_from_b").identity()
    differing = {key for key in ours.keys() | base.keys() if ours.get(key) != base.get(key)}
    allowed = ["targets", "training.epochs", "run.folder", "training.initial_encoder"]
    if name == "per_token_b":
        allowed.append("data.mask")  # it has none
    assert [key for key in differing if not key.startswith(tuple(allowed))] == []


@pytest.mark.parametrize(("name", "row"), FINETUNED.items(), ids=FINETUNED)
def test_fine_tuning_is_as_published(name: str, row: Finetuned) -> None:
    recipe: FinetuneRecipe = load_finetune_recipe(f"finetune/{name}")
    training, data = recipe.training, recipe.data
    size, dataset = name.split("_")
    ssv2 = dataset == "ssv2"
    assert (recipe.lr_batch, training.global_batch, data.copies) == (row.batch, 2 * row.batch, 2)
    assert (training.base_lr, training.min_lr, training.layer_decay) == (row.base_lr, row.min_lr, row.layer_decay)
    assert (training.epochs, training.warmup_epochs) == (row.epochs, 5)
    assert (training.betas, training.weight_decay, training.clip_grad) == ((0.9, 0.999), 0.05, None)
    assert (training.ema_decay, training.precision) == (None, "fp16")
    assert training.gradient_checkpointing == row.checkpointing
    assert (recipe.model.size, recipe.model.drop_path) == (size.upper(), row.drop_path)
    head = recipe.classifier
    assert (head.dropout, head.label_smoothing, head.init_scale) == (row.dropout, 0.1, 0.001)
    assert head.classes == CLASSES[dataset]
    assert recipe.mix == MixConfig(mixup=0.8, cutmix=1.0, switch=0.5, probability=1.0)
    assert (data.sampling, data.flip) == (("segments", 0) if ssv2 else ("window", 0.5))
    assert (data.stride, recipe.model.frames, recipe.model.tubelet) == (4, 16, 2)
    assert data.crop == RandomResizedCrop(
        area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), interpolation="bilinear", antialias=False
    )
    assert data.augment.rand_augment == RandAugment(operations=4, magnitude=7, deviation=0.5, probability=0.5)
    assert data.augment.erasing == RandomErasing(probability=0.25)
    assert data.augment.color_jitter is None
    views = ("uniform", 2, 3) if ssv2 else ("dense", 5, 3)
    assert (recipe.test.sampling, recipe.test.clips, recipe.test.crops) == views
    assert recipe.test.stride == 4
    # The published test is of the last epoch; the test list chooses nothing.
    assert recipe.validation is None


@pytest.mark.parametrize(("name", "row"), DETECTED.items(), ids=DETECTED)
def test_detection_is_as_published(name: str, row: Detected) -> None:
    recipe = load_detection_recipe(f"detection/{name}")
    training, data, detector = recipe.training, recipe.data, recipe.detector
    assert recipe.model.size == name[0].upper()
    assert (training.base_lr, training.epochs, training.layer_decay) == (row.base_lr, row.epochs, row.layer_decay)
    assert (recipe.lr_batch, training.warmup_epochs, training.min_lr) == (row.batch, 5, 1e-6)
    assert (training.betas, training.weight_decay, training.ema_decay) == ((0.9, 0.999), 0.05, None)
    assert training.gradient_checkpointing == row.checkpointing
    assert (recipe.model.frames, data.stride, recipe.model.input_size) == (16, 4, 224)
    assert (recipe.model.drop_path, detector.dropout, detector.init_scale) == (0.2, 0, 0.001)
    assert (detector.classes, detector.resolution, detector.widen) == (80, 7, (0.1, 0.05))
    assert data.crop == ShortSideCrop(sides=(256, 256), antialias=False)
    assert data.flip == 0.5
    assert recipe.key_frames.jitter == (0.2, 0.1, 0.1, 0.05)
    assert recipe.validation is None
