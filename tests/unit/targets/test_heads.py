"""Targets at visible and at all tokens: predicted from the encoder's tokens, compared at the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mvd_scale.config import ModelConfig, Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Encoder, Student
from mvd_scale.targets import MaskedDistillation, build_targets
from mvd_scale.targets.load import build_ema_encoder

VIDEO = {"width": 48, "depth": 1, "heads": 3, "frames": 4, "input_size": 32}
WIDER = {**VIDEO, "width": 64, "heads": 4}
IMAGE = {**VIDEO, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}


def recipe(targets: dict[str, Any], mask: dict[str, Any] | None, **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"folder": "run"},
            "model": {**VIDEO, **model},
            "data": {"mask": mask},
            "targets": targets,
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
        }
    )


def teacher(name: str) -> Encoder:
    torch.manual_seed(3)
    return Encoder(ModelConfig.model_validate({"wide": WIDER, "image": IMAGE}.get(name, VIDEO)), final_norm=False)


def batch(masked: bool) -> ClipBatch:
    visible = torch.tensor([[0, 3, 4, 7], [1, 2, 5, 6]]) if masked else torch.arange(8).expand(2, -1)
    hidden = torch.tensor([[1, 2, 5, 6], [0, 3, 4, 7]]) if masked else torch.empty(2, 0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return ClipBatch(pixels, visible, hidden, torch.zeros(2), torch.zeros(2))


def build(made: Recipe) -> tuple[Student, dict[str, Any]]:
    targets = build_targets(made, teacher)
    return Student.from_recipe(made, targets), targets


def test_two_teachers_of_different_widths_at_visible_tokens() -> None:
    at = {"tokens": "visible", "distance": "cosine"}
    made = recipe(
        {
            "wide": {"kind": "video_teacher", "head": "linear", **at},
            "image": {"kind": "image_teacher", "head": "mlp", "hidden": 20, **at},
        },
        {"ratio": 0.5},
    )
    (student, targets), clips = build(made), batch(masked=True)
    predictions = student(clips.pixels, clips.visible, clips.masked)
    assert predictions["wide"].shape == (2, 4, 64)
    assert predictions["image"].shape == (2, 4, 48)
    loss, distances = MaskedDistillation(targets)(student, clips)
    whole = targets["wide"].encode(clips, None)
    truth = torch.stack([whole[clip][clips.visible[clip]] for clip in range(2)])
    expected = 1 - F.cosine_similarity(predictions["wide"], truth, dim=2).mean()
    torch.testing.assert_close(distances["wide"], expected.detach())
    torch.testing.assert_close(loss, sum(distances.values()))
    torch.testing.assert_close(targets["wide"].features(clips), truth)
    # What is hidden from the student changes its targets, not its predictions.
    changed = clips.pixels.clone()
    changed[0, :2, :16, 16:] = 0  # token 1 of clip 0
    assert torch.equal(student(changed, clips.visible, clips.masked)["wide"], predictions["wide"])


def test_every_token_by_an_mlp_without_a_mask() -> None:
    made = recipe({"video": {"kind": "video_teacher", "head": "mlp", "tokens": "all"}}, None)
    (student, targets), clips = build(made), batch(masked=False)
    assert made.visible_tokens == made.tokens == 8
    predictions = student(clips.pixels, clips.visible, clips.masked)["video"]
    layers = student.heads["video"].layers
    tokens = student.encoder(clips.pixels)
    torch.testing.assert_close(predictions, layers[2](F.gelu(layers[0](tokens))))  # type: ignore[index]
    assert layers[0].out_features == 48  # type: ignore[index, union-attr]
    _, distances = MaskedDistillation(targets)(student, clips)
    torch.testing.assert_close(
        distances["video"], F.smooth_l1_loss(predictions, teacher("video")(clips.pixels)).detach()
    )


def test_heads_leave_a_class_token_out() -> None:
    image = {"frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
    made = recipe({"image": {"kind": "image_teacher", "head": "linear", "tokens": "all"}}, None, **image)
    student, _ = build(made)
    pixels, visible = batch(masked=False).pixels[:, :1], torch.arange(4).expand(2, -1)
    predictions = student(pixels, visible, visible[:, :0])["image"]
    torch.testing.assert_close(predictions, student.heads["image"].layers(student.encoder(pixels)[:, 1:]))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_pixels_of_visible_tokens(head: str) -> None:
    made = recipe(
        {"pixels": {"kind": "pixels", "normalize": "none", "head": head, "tokens": "visible"}}, {"ratio": 0.5}
    )
    (student, targets), clips = build(made), batch(masked=True)
    truth = targets["pixels"].features(clips)
    # Token 3 of clip 0 is the lower right corner of the first tubelet.
    torch.testing.assert_close(truth[0, 1], clips.pixels[0, :2, 16:, 16:].float().div(255).flatten())
    assert student(clips.pixels, clips.visible, clips.masked)["pixels"].shape == truth.shape


def test_a_momentum_target_is_the_average_on_the_whole_clip() -> None:
    target = {"kind": "momentum", "norm": True, "decoder": {"width": 32, "depth": 1, "heads": 2}}
    made = recipe({"average": target}, {"ratio": 0.5}, drop_path=0.3)
    average = build_ema_encoder(made)
    assert average.config.drop_path == 0
    targets = build_targets(made, lambda _: average)
    clips = batch(masked=True)
    whole = average(clips.pixels)
    truth = torch.stack([F.layer_norm(whole[clip][clips.masked[clip]], (48,), eps=1e-6) for clip in range(2)])
    torch.testing.assert_close(targets["average"].features(clips), truth)
    assert targets["average"].channels == 48
    assert all(not parameter.requires_grad for parameter in average.parameters())
