"""Files in the forms of the authors of MAE and VideoMAE are the teachers that the shipped recipes name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mvd_scale.checkpoints.publish import to_published
from mvd_scale.checkpoints.weights import read_checkpoint, save_weights
from mvd_scale.config import load_recipe
from mvd_scale.config.target import TrainedTeacherTarget
from mvd_scale.models import Encoder
from mvd_scale.targets.load import load_teacher


@pytest.mark.parametrize(("name", "family"), [("image", "mae"), ("video", "videomae")])
def test_a_published_file_is_the_teacher_of_the_recipe(tmp_path: Path, name: str, family: str) -> None:
    target = load_recipe("distill/b_from_b").targets[name]
    assert isinstance(target, TrainedTeacherTarget)
    assert target.model is not None
    encoder = Encoder(target.model)
    own, published = tmp_path / "own.safetensors", tmp_path / f"{family}_b.pth"
    save_weights(own, encoder.state_dict(), target.model)
    torch.save({"model": to_published(read_checkpoint(own), family)}, published)
    recipe = load_recipe("distill/b_from_b", [f"--targets.{name}.checkpoint", str(published)])
    teacher = load_teacher(recipe, name)
    assert torch.equal(teacher.blocks[11].mlp.fc2.weight, encoder.blocks[11].mlp.fc2.weight)
