"""Targets of the student against computations by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mvd_scale.config import ModelConfig, Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student
from mvd_scale.models.encoder import Patchify
from mvd_scale.targets import MaskedDistillation, build_targets

VIDEO = {"width": 48, "depth": 1, "heads": 3, "frames": 4, "input_size": 32}
IMAGE = {**VIDEO, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
DECODER = {"width": 32, "depth": 1, "heads": 2}


def recipe(**targets: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"folder": "run"},
            "model": VIDEO,
            "data": {"mask": {"ratio": 0.5}},
            "targets": {name: {"decoder": DECODER, **target} for name, target in targets.items()},
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
        }
    )


def teacher(**shape: Any) -> Encoder:
    torch.manual_seed(3)
    return Encoder(ModelConfig.model_validate(shape), final_norm=False)


@pytest.fixture
def batch() -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    return ClipBatch(
        pixels=torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=generator),
        visible=torch.tensor([[0, 3, 4, 7], [1, 2, 5, 6]]),
        masked=torch.tensor([[1, 2, 5, 6], [0, 3, 4, 7]]),
        labels=torch.zeros(2, dtype=torch.int64),
        video_ids=torch.zeros(2, dtype=torch.int64),
    )


def tube(batch: ClipBatch, clip: int, token: int) -> torch.Tensor:
    t, h, w = token // 4, token // 2 % 2, token % 2
    return batch.pixels[clip, 2 * t : 2 * t + 2, 16 * h : 16 * h + 16, 16 * w : 16 * w + 16].double() / 255


@pytest.mark.parametrize("normalize", ["none", "channel", "patch"])
def test_pixels_are_normalised_within_a_token(batch: ClipBatch, normalize: str) -> None:
    made = recipe(pixels={"kind": "pixels", "normalize": normalize})
    features = build_targets(made, teacher)["pixels"].features(batch)
    values = tube(batch, 1, 3)
    if normalize == "channel":
        flat = values.reshape(-1, 3)
        values = (values - flat.mean(0)) / (flat.std(0) + 1e-6)
    elif normalize == "patch":
        values = (values - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        values = (values - values.mean()) / (values.var() + 1e-6).sqrt()
    torch.testing.assert_close(features[1, 1].double(), values.flatten(), atol=1e-5, rtol=1e-5)


def test_the_image_teacher_sees_the_front_frame_of_each_tubelet_alone(batch: ClipBatch) -> None:
    image = teacher(**IMAGE)
    target = build_targets(recipe(image={"kind": "image_teacher"}), lambda _: image)["image"]
    features = target.features(batch)
    # Token 5 of clip 0: second time slice, so frame 2; patch 1 behind the class token.
    alone = image(batch.pixels[:1, 2:3])[0, 1 + 1]
    torch.testing.assert_close(features[0, 2], alone, atol=1e-5, rtol=1e-5)


def test_the_video_teacher_sees_the_whole_clip(batch: ClipBatch) -> None:
    video = teacher(**VIDEO)
    target = build_targets(recipe(video={"kind": "video_teacher"}), lambda _: video)["video"]
    torch.testing.assert_close(target.features(batch)[0, 2], video(batch.pixels)[0, 5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("distance", ["smooth_l1", "l1", "l2"])
def test_the_loss_is_the_weighted_sum_of_mean_distances(batch: ClipBatch, distance: str, norm: bool) -> None:
    made = recipe(
        image={"kind": "image_teacher", "weight": 0.5, "distance": distance, "norm": norm},
        video={"kind": "video_teacher", "weight": 2.0, "distance": distance, "norm": norm},
    )
    teachers = {"image": teacher(**IMAGE), "video": teacher(**VIDEO)}
    targets = build_targets(made, teachers.__getitem__)
    student = Student.from_recipe(made, targets)
    loss, distances = MaskedDistillation(targets)(student, batch)
    measure = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "l2": F.mse_loss}[distance]
    expected = 0.0
    predictions = student(batch.pixels, batch.visible, batch.masked)
    for name, weight in (("image", 0.5), ("video", 2.0)):
        features = targets[name].features(batch)
        assert (features.mean(-1).abs().max() < 1e-4) == norm
        one = measure(predictions[name], features)
        torch.testing.assert_close(distances[name], one)
        expected = expected + weight * one
    torch.testing.assert_close(loss, expected)


SMALL_IMAGE = {**IMAGE, "input_size": 16, "patch_size": 8}
CO_TEACHING: dict[str, Any] = {"image": {"kind": "image_teacher"}, "video": {"kind": "video_teacher"}}


def rows_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call that makes rows of all tokens; those of an image are fewer."""
    made: list[int] = []
    rows_of = Patchify.rows

    def counted(cut: Patchify, pixels: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        rows = rows_of(cut, pixels, tokens)
        if tokens is None:
            made.append(rows.shape[1])
        return rows

    monkeypatch.setattr(Patchify, "rows", counted)
    return made


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mask", ["tube", "random"])
@pytest.mark.parametrize("tokens", ["masked", "visible"])
def test_teachers_whose_grids_agree_share_one_patch_embedding(
    batch: ClipBatch, monkeypatch: pytest.MonkeyPatch, ahead: bool, tokens: str, mask: str
) -> None:
    head = {} if tokens == "masked" else {"head": "linear", "tokens": tokens, "decoder": None}
    shapes = {**CO_TEACHING, "pixels": {"kind": "pixels"}}
    made = recipe(**{name: {**target, **head} for name, target in shapes.items()})
    data = made.data.model_copy(update={"mask": made.data.mask.model_copy(update={"kind": mask})})  # type: ignore[union-attr]
    made = made.model_copy(update={"data": data})
    teachers = {"image": teacher(**IMAGE).bfloat16(), "video": teacher(**VIDEO).bfloat16()}
    objective = MaskedDistillation(build_targets(made, teachers.__getitem__))
    expected = {name: target.raw_features(batch) for name, target in objective.targets.items()}
    calls = rows_made(monkeypatch)
    found = objective.prefetch_features(batch).features if ahead else objective._raw(batch, objective.targets)
    assert calls == [8]
    for name, features in found.items():
        torch.testing.assert_close(features, expected[name], rtol=2e-2, atol=2e-2)
        assert not features.requires_grad
    assert found.keys() == (set(shapes) - {"pixels"} if ahead else set(shapes))


def test_a_moving_average_shares_it_too(batch: ClipBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(image={"kind": "image_teacher"}, average={"kind": "momentum"})
    teachers = {"image": teacher(**IMAGE), "average": teacher(**VIDEO)}
    objective = MaskedDistillation(build_targets(made, teachers.__getitem__))
    expected = {name: target.raw_features(batch) for name, target in objective.targets.items()}
    calls = rows_made(monkeypatch)
    torch.testing.assert_close(objective._raw(batch, objective.targets), expected)
    assert calls == [8]


@pytest.mark.parametrize("differing", ["side", "precision", "colours", "recording", "alone"])
def test_teachers_that_differ_have_patch_embeddings_of_their_own(
    batch: ClipBatch, monkeypatch: pytest.MonkeyPatch, differing: str
) -> None:
    teachers = {"image": teacher(**(SMALL_IMAGE if differing == "side" else IMAGE)), "video": teacher(**VIDEO)}
    if differing == "precision":
        teachers["image"].bfloat16()
    if differing == "colours":
        teachers["image"].mean = (0.5, 0.5, 0.5)
    kinds = CO_TEACHING if differing != "alone" else {"image": CO_TEACHING["image"]}
    objective = MaskedDistillation(build_targets(recipe(**kinds), teachers.__getitem__))
    if differing == "recording":
        objective.targets["image"].accepts_rows = False  # type: ignore[attr-defined]
    batch = replace(batch, resized={16: batch.pixels[:, :, ::2, ::2]})
    expected = {name: target.raw_features(batch) for name, target in objective.targets.items()}
    calls = rows_made(monkeypatch)
    torch.testing.assert_close(objective._raw(batch, objective.targets), expected)
    # The front frames of two clips are images of four tokens.
    assert calls == [4, 8][: len(kinds)]


def test_features_of_frozen_teachers_may_be_computed_ahead_in_their_precision(batch: ClipBatch) -> None:
    made = recipe(
        video={"kind": "video_teacher", "norm": True}, average={"kind": "momentum"}, pixels={"kind": "pixels"}
    )
    teachers = {"video": teacher(**VIDEO).bfloat16(), "average": teacher(**VIDEO)}
    targets = build_targets(made, teachers.__getitem__)
    student = Student.from_recipe(made, targets)
    objective = MaskedDistillation(targets)
    ahead = objective.prefetch_features(batch)
    assert {name: features.dtype for name, features in ahead.features.items()} == {"video": torch.bfloat16}
    assert ahead.features["video"].shape == (2, 4, 48)
    assert not ahead.features["video"].requires_grad
    (loss, distances), (same, same_distances) = objective(student, batch), objective(student, ahead)
    assert torch.equal(loss, same)
    assert distances == same_distances
    # They are taken as they come.
    zeros = replace(ahead, features={"video": torch.zeros_like(ahead.features["video"])})
    assert objective(student, zeros)[1]["video"] != distances["video"]


def test_no_gradient_reaches_a_teacher_and_none_of_it_is_the_student(batch: ClipBatch) -> None:
    video = teacher(**VIDEO)
    targets = build_targets(recipe(video={"kind": "video_teacher"}), lambda _: video)
    made = recipe(video={"kind": "video_teacher"})
    student = Student(made.model, {"video": (made.targets["video"].head_config, 48)})
    loss, _ = MaskedDistillation(targets)(student, batch)
    loss.backward()
    assert all(not p.requires_grad and p.grad is None for p in video.parameters())
    assert not video.training


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("image_teacher", VIDEO, "takes clips of 4 frames"),
        (
            "image_teacher",
            {**IMAGE, "patch_size": 8},
            r"the student's 2x2x2: .*`resample: true`, or .*`input_size: 16`",
        ),
        ("video_teacher", {**VIDEO, "frames": 8}, "takes 8 frames, the student's clips have 4"),
    ],
)
def test_a_teacher_of_another_grid_is_refused(kind: str, shape: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_targets(recipe(teacher={"kind": kind}), lambda _: teacher(**shape))
