"""Teachers of measured steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mvd_scale.checkpoints.native import save_weights
from mvd_scale.config import load_recipe
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.targets.build import init_teacher, load_or_init_teacher


def test_a_teacher_is_what_its_checkpoint_says_and_random_without_one(tmp_path: Path) -> None:
    bare = load_recipe("quickstart/student", [])
    teacher = init_teacher(bare, "video")
    assert isinstance(teacher, Encoder)
    save_weights(tmp_path / "encoder.safetensors", teacher.state_dict(), teacher.config)
    recipe = load_recipe("quickstart/student", ["--targets.video.checkpoint", str(tmp_path / "encoder.safetensors")])
    weight = teacher.patch_embed.weight
    assert torch.equal(load_or_init_teacher(recipe, "video").patch_embed.weight, weight)
    assert not torch.equal(load_or_init_teacher(bare, "video").patch_embed.weight, weight)
    assert not torch.equal(init_teacher(recipe, "video").patch_embed.weight, weight)


def test_a_teacher_without_shape_and_checkpoint_is_refused() -> None:
    recipe = load_recipe("quickstart/student", ["--targets.video.model", "null"])
    with pytest.raises(UserError, match=r"targets\.video\.model is missing"):
        load_or_init_teacher(recipe, "video")
