"""Spatial targets: features of a frozen image model (Sec. 3.3, "Reconstruction targets")."""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_scale.config import ImageTeacherTarget, ModelConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.targets.resampling import make_resampler
from mvd_scale.targets.target import EncoderTeacher


class ImageTeacher(EncoderTeacher):
    """Target whose teacher sees the front frame of every tubelet as a separate image."""

    def __init__(
        self, name: str, config: ImageTeacherTarget, teacher: Encoder, student: ModelConfig, *, tubes: bool
    ) -> None:
        """Check that the teacher fits the student's token grid.

        Args:
            name: name of the target, for messages.
            config: settings of the target.
            teacher: encoder of single frames.
            student: shape of the student's encoder.
            tubes: whether every tubelet of a clip has the same number of target tokens (tube masking).

        Raises:
            UserError: the teacher takes clips, or its grid differs from the student's and is not resampled.
        """
        super().__init__(config, teacher, student.tubelet)
        # Masked and visible tokens of a frame do not lie one after the other.
        self.tubes = tubes and not config.visible_weight
        self.patches = student.grid[1] * student.grid[2]
        if teacher.config.frames != 1:
            raise UserError(
                f"targets.{name} is an image teacher, but its checkpoint takes clips of {teacher.config.frames} "
                "frames; expected a model of single frames (model.frames 1), or `kind: video_teacher`"
            )
        grid = (student.grid[0], *teacher.config.grid[1:])
        side = student.grid[1] * teacher.config.patch_size
        self.resampler = make_resampler(name, grid, student.grid, allowed=config.resample, side=side)

    def encode(self, batch: ClipBatch, tokens: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Features at the tokens int64 (B, M), or at all tokens but the class token if None: (B, M, D).

        With tube masking, every frame has the same number of tokens, and the teacher's last block computes only those.
        `rows` (B, N, t p p 3) are rows of the patch embedding of whole tubelets, whose first p p 3 values are the
        front frame.
        """
        fronts, shape = front_frames(batch.at(self.input_size), self.tubelet)
        given = {}
        if rows is not None:
            front = rows[..., : rows.shape[-1] // self.tubelet]
            given["rows"] = front.unflatten(1, (shape[1], -1)).flatten(0, 1)
        if tokens is not None and self.tubes and self.resampler is None:
            # Tokens are ascending and time-major, so they split into equal runs, one per frame. Subtracting the
            # frame's first index turns indices in the clip into indices in the frame.
            slices = tokens.view(*shape, -1) - self.patches * torch.arange(shape[1], device=tokens.device).unsqueeze(1)
            features: Tensor = self.teacher(fronts, output_tokens=slices.flatten(0, 1), **given)
            return features.unflatten(0, shape).flatten(1, 2)
        features = self.teacher(fronts, **given)
        return self.select(features[:, self.extra_tokens :].unflatten(0, shape).flatten(1, 2), tokens)


def front_frames(pixels: Tensor, tubelet: int) -> tuple[Tensor, tuple[int, int]]:
    """Extract the front frame of every tubelet as a clip of one frame.

    Args:
        pixels: (B, T, H, W, 3).
        tubelet: frames of a token.

    Returns:
        frames (B * T / tubelet, 1, H, W, 3), and the shape (B, T / tubelet) to undo the flattening.
    """
    fronts = pixels[:, ::tubelet]
    return fronts.flatten(0, 1).unsqueeze(1), (fronts.shape[0], fronts.shape[1])
