"""Targets from any vision transformer of timm, such as DINOv2 or SigLIP, beside or instead of MAE."""

from __future__ import annotations

from torch import Tensor

from mvd_scale.config import ModelConfig, TimmTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets.image_teacher import front_frames
from mvd_scale.targets.resampling import make_resampler
from mvd_scale.targets.target import FrozenTeacher


class TimmTeacher(FrozenTeacher):
    """Target whose timm teacher sees the front frame of every tubelet as a separate image.

    Raises:
        UserError: the teacher's grid differs from the student's and is not resampled.
    """

    def __init__(self, name: str, config: TimmTarget, teacher: TimmViT, student: ModelConfig) -> None:
        super().__init__(config, teacher, teacher.input_size)
        self.tubelet = student.tubelet
        patches = teacher.input_size // teacher.patch_size
        grid, side = (student.grid[0], patches, patches), student.grid[1] * teacher.patch_size
        self.resampler = make_resampler(name, grid, student.grid, allowed=config.resample, side=side)

    def encode(self, batch: ClipBatch, tokens: Tensor | None) -> Tensor:
        """Compute features at the tokens int64 (B, M), or at all tokens if None: (B, M, D)."""
        fronts, shape = front_frames(batch.at(self.input_size), self.tubelet)
        features: Tensor = self.teacher(fronts)
        return self.select(features.unflatten(0, shape).flatten(1, 2), tokens)
