"""Any vision transformer of timm as a teacher: its patch features, its own input size, mean and std."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mvd_scale.config import Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.errors import UserError
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets.build import load_targets
from mvd_scale.targets.load import teacher_input_sizes


def recipe(tmp_path: Path, vit: str, **target: Any) -> Recipe:
    torch.manual_seed(0)
    weights = tmp_path / "vit.pth"
    if timm.is_model(vit):
        torch.save(timm.create_model(vit, pretrained=False).state_dict(), weights)
    decoder = {"width": 32, "depth": 1, "heads": 2}
    return Recipe.model_validate(
        {
            "run": {"folder": "run"},
            "model": {"width": 32, "depth": 1, "heads": 2, "frames": 4, "input_size": 64},
            "data": {"mask": {"ratio": 0.5}},
            "targets": {"dino": {"kind": "timm", "vit": vit, "checkpoint": weights, "decoder": decoder, **target}},
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
        }
    )


def batch(side: int) -> ClipBatch:
    small = torch.zeros(2, 4, 64, 64, 3, dtype=torch.uint8)
    resized = torch.randint(0, 256, (2, 4, side, side, 3), dtype=torch.uint8)
    tokens = torch.arange(32).expand(2, -1)
    return ClipBatch(small, tokens[:, :16], tokens[:, 16:], torch.zeros(2), torch.zeros(2), {side: resized})


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("vit", ["vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224"])
def test_patch_features_of_front_frames(tmp_path: Path, vit: str, final_norm: bool) -> None:
    made = recipe(tmp_path, vit, final_norm=final_norm)
    target = load_targets(made)["dino"]
    assert isinstance(target.teacher, TimmViT)  # type: ignore[attr-defined]
    inner = target.teacher.vit  # type: ignore[attr-defined]
    side = 4 * inner.patch_embed.patch_size[0]
    assert teacher_input_sizes(made, {"dino": target}) == (() if side == 64 else (side,))
    clips = batch(side) if side != 64 else ClipBatch(batch(64).at(64), *list(vars(batch(64)).values())[1:5])
    features = target.features(clips)
    assert features.shape == (2, 16, inner.num_features)
    # Token 20 of clip 1: second slice, so frame 2; patch 4.
    config = inner.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    image = (clips.at(side)[1, 2].permute(2, 0, 1).float() / 255 - mean) / std
    with torch.no_grad():
        expected = inner.forward_features(image[None])[0, inner.num_prefix_tokens + 4]
    torch.testing.assert_close(features[1, 4], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("vit", "target", "message"),
    [
        ("vit_tiny_patch16_224", {"input_size": 224}, "`input_size: 64`"),
        ("vit_tinny_patch16_224", {}, "close to it: vit_tiny_patch16_224"),
        ("resnet18", {}, "no plain vision transformer"),
        ("eva02_tiny_patch14_224", {"final_norm": True}, "has no norm after its last block"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, vit: str, target: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_targets(recipe(tmp_path, vit, **target))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path, "vit_tiny_patch16_224")
    torch.save(timm.create_model("vit_small_patch16_224").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"norm\.weight is \(384,\), expected \(192,\)|does not fit the model"):
        load_targets(made)
