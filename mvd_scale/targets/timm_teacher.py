"""Targets from any vision transformer of timm, such as DINOv2 or SigLIP, beside or instead of MAE."""

from __future__ import annotations

from torch import Tensor

from mvd_scale.config import ModelConfig, TimmTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.errors import UserError
from mvd_scale.models.blocks import select_output_tokens
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets.image_teacher import front_frames
from mvd_scale.targets.target import FrozenTeacher


class TimmTeacher(FrozenTeacher):
    """Target whose timm teacher sees the front frame of every tubelet as a separate image."""

    def __init__(self, name: str, config: TimmTarget, teacher: TimmViT, student: ModelConfig) -> None:
        super().__init__(config, teacher, teacher.width, teacher.input_size)
        self.tubelet = student.tubelet
        if config.input_size not in (None, teacher.input_size):
            raise UserError(
                f"targets.{name}.input_size {config.input_size} does not give the student's grid of "
                f"{student.grid[1]}x{student.grid[2]} tokens with patches of {teacher.patch_size} pixels; "
                f"{teacher.input_size} would match"
            )

    def encode(self, batch: ClipBatch, tokens: Tensor | None) -> Tensor:
        """Compute features at the tokens int64 (B, M), or at all tokens if None: (B, M, D)."""
        fronts, shape = front_frames(batch.at(self.input_size), self.tubelet)
        features: Tensor = self.teacher(fronts)
        return select_output_tokens(features.unflatten(0, shape).flatten(1, 2), tokens)
