"""Spatial targets: features of a frozen image model (Sec. 3.3, "Reconstruction targets")."""

from __future__ import annotations

from torch import Tensor

from mvd_scale.config import ImageTeacherTarget, ModelConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.targets.target import FrozenTeacher


class ImageTeacher(FrozenTeacher):
    """The teacher sees the front frame of every tubelet as an image of its own."""

    def __init__(self, name: str, config: ImageTeacherTarget, teacher: Encoder, student: ModelConfig) -> None:
        super().__init__(config, teacher, teacher.width, teacher.config.input_size)
        self.tubelet = student.tubelet
        self.extra_tokens = int(teacher.config.class_token)
        if teacher.config.frames != 1:
            raise UserError(
                f"targets.{name} is an image teacher, but its checkpoint takes clips of {teacher.config.frames} "
                "frames; expected a model of single frames (model.frames 1), or `kind: video_teacher`"
            )
        _, rows, columns = teacher.config.grid
        if (rows, columns) != student.grid[1:]:
            size = student.grid[1] * teacher.config.patch_size
            raise UserError(
                f"targets.{name}: the teacher's grid is {rows}x{columns}, the student's "
                f"{student.grid[1]}x{student.grid[2]}; a teacher of input size {size} would match"
            )

    def encode(self, batch: ClipBatch) -> Tensor:
        """Features of all tokens: (B, N, D); the class token is dropped."""
        fronts, shape = front_frames(batch.at(self.input_size), self.tubelet)
        features: Tensor = self.teacher(fronts)
        return features[:, self.extra_tokens :].unflatten(0, shape).flatten(1, 2)


def front_frames(pixels: Tensor, tubelet: int) -> tuple[Tensor, tuple[int, int]]:
    """The front frame of every tubelet as a clip of its own.

    Args:
        pixels: (B, T, H, W, 3).
        tubelet: frames of a token.

    Returns:
        (B * T / tubelet, 1, H, W, 3), and (B, T / tubelet).
    """
    fronts = pixels[:, ::tubelet]
    return fronts.flatten(0, 1).unsqueeze(1), (fronts.shape[0], fronts.shape[1])
