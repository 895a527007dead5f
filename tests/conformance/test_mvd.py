"""Stage 2 as its authors' code computes it: teacher features, predictions, every loss, every gradient."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvd_scale.checkpoints import (
    Checkpoint,
    Hints,
    build_encoder,
    build_student,
    export_checkpoint,
    load_encoder,
    read_checkpoint,
)
from mvd_scale.config import DecoderConfig, ImageTeacherTarget, ModelConfig, VideoTeacherTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Student
from mvd_scale.targets import MaskedDistillation
from mvd_scale.targets.image_teacher import ImageTeacher
from mvd_scale.targets.video_teacher import VideoTeacher

from .conftest import LOSS, OUTPUT, Vectors, assert_gradients, publish, published_gradients

VARIANTS = [f"{distance}{norm}" for distance in ("smooth_l1", "l1", "l2") for norm in ("", "_norm_feature")]


@dataclass
class Stage2:
    """The three models, imported, and the batch of the reference."""

    vectors: Vectors
    checkpoint: Checkpoint
    student: Student
    batch: ClipBatch
    folder: Path

    def teachers(self, distance: Any, norm: bool) -> dict[str, ImageTeacher | VideoTeacher]:
        """Both targets, their teachers loaded as a recipe's are."""
        config, folder = self.vectors.config, self.folder
        video = Hints(heads=config["theads"], frames=config["T"], input_size=config["S"])
        image = Hints(heads=config["theads"])
        files = {
            "video": publish(folder, self.vectors.under("video_teacher."), "pth"),
            "image": publish(folder, self.vectors.under("image_teacher."), "safetensors"),
        }
        shape: dict[str, Any] = {
            "decoder": DecoderConfig(width=16, depth=1, heads=1),
            "distance": distance,
            "norm": norm,
        }
        model: ModelConfig = self.checkpoint.model
        image_teacher = load_encoder(files["image"], final_norm=False, hints=image)
        video_teacher = load_encoder(files["video"], final_norm=False, hints=video)
        return {
            "image": ImageTeacher("image", ImageTeacherTarget(**shape), image_teacher, model, tubes=True),
            "video": VideoTeacher("video", VideoTeacherTarget(**shape), video_teacher, model),
        }


@pytest.fixture
def stage2(mvd: Vectors, tmp_path: Path) -> Stage2:
    hints = Hints(heads=mvd.config["heads"], decoder_heads=mvd.config["dec_heads"])
    checkpoint = read_checkpoint(publish(tmp_path, mvd.under("student."), "pth"), hints)
    visible, masked = mvd.tokens()
    nothing = torch.zeros(len(visible), dtype=torch.int64)
    resized = {mvd.config["iS"]: mvd.clips("image_teacher_video")}
    batch = ClipBatch(mvd.clips("video"), visible, masked, nothing, nothing, resized)
    return Stage2(mvd, checkpoint, build_student(checkpoint), batch, tmp_path)


def test_the_file_tells_its_shape(stage2: Stage2) -> None:
    config, model = stage2.vectors.config, stage2.checkpoint.model
    assert (stage2.checkpoint.format, stage2.checkpoint.kind) == ("mvd", "student")
    assert (model.width, model.depth, model.frames, model.input_size) == (
        config["D"],
        config["depth"],
        config["T"],
        config["S"],
    )
    assert (model.positions, model.patch_size, model.tubelet) == ("sincos3d", 16, 2)
    assert not stage2.checkpoint.unexpected


def test_predictions(stage2: Stage2) -> None:
    batch = stage2.batch
    with torch.no_grad():
        predictions: dict[str, Tensor] = stage2.student(batch.pixels, batch.visible, batch.masked)
    torch.testing.assert_close(predictions["image"], stage2.vectors["pred_image"], **OUTPUT)
    torch.testing.assert_close(predictions["video"], stage2.vectors["pred_video"], **OUTPUT)


def test_teacher_features(stage2: Stage2) -> None:
    for name, target in stage2.teachers("smooth_l1", False).items():
        with torch.no_grad():
            torch.testing.assert_close(target.encode(stage2.batch, None), stage2.vectors[f"feat_{name}"], **OUTPUT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses(stage2: Stage2, variant: str) -> None:
    targets = stage2.teachers(variant.removesuffix("_norm_feature"), variant.endswith("_norm_feature"))
    with torch.no_grad():
        _, distances = MaskedDistillation(targets)(stage2.student, stage2.batch)
    expected = json.loads(stage2.vectors.metadata["losses"])[variant]
    assert [float(distances["image"]), float(distances["video"])] == pytest.approx(expected, **LOSS)


def test_every_gradient_of_the_total_loss(stage2: Stage2) -> None:
    loss, _ = MaskedDistillation(stage2.teachers("smooth_l1", False))(stage2.student, stage2.batch)
    assert loss.item() == pytest.approx(float(stage2.vectors.metadata["total_smooth_l1"]), **LOSS)
    loss.backward()
    assert_gradients(stage2.vectors, published_gradients(stage2.checkpoint, stage2.student, "mvd"))


def test_the_student_goes_back_out_as_it_came(stage2: Stage2, tmp_path: Path) -> None:
    export_checkpoint(stage2.checkpoint, "mvd", tmp_path / "out.pth")
    there = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    published = stage2.vectors.under("student.")
    assert there.keys() == published.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(there[name], tensor, rtol=0, atol=1e-6)


def test_the_encoder_alone_is_the_student_s(stage2: Stage2) -> None:
    encoder = build_encoder(stage2.checkpoint, final_norm=True)
    with torch.no_grad():
        torch.testing.assert_close(encoder(stage2.batch.pixels), stage2.student.encoder(stage2.batch.pixels))
