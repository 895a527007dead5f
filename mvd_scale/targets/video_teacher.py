"""Spatial-temporal targets: features of a frozen video model (Sec. 3.2, 3.3)."""

from __future__ import annotations

from torch import Tensor

from mvd_scale.config import ModelConfig, VideoTeacherTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.targets.resampling import make_resampler
from mvd_scale.targets.target import EncoderTeacher, PatchRowsKey


class VideoTeacher(EncoderTeacher):
    """Target whose teacher sees the whole, unmasked clip, or every n-th frame of it.

    Raises:
        UserError: the teacher's frames are not every n-th of the student's, or its token grid differs from the
            student's and is not resampled.
    """

    def __init__(self, name: str, config: VideoTeacherTarget, teacher: Encoder, student: ModelConfig) -> None:
        super().__init__(config, teacher, student.tubelet)
        model = teacher.config
        self.stride, rest = divmod(student.frames, model.frames)
        if rest:
            raise UserError(
                f"targets.{name}: the teacher takes {model.frames} frames, the student's clips have {student.frames}: "
                f"give targets.{name}.frames a number that divides {student.frames}"
            )
        side = student.grid[1] * model.patch_size
        self.resampler = make_resampler(name, model.grid, student.grid, allowed=config.resample, side=side)

    @property
    def rows_key(self) -> PatchRowsKey | None:
        """Key of the rows that the teacher accepts in place of pixels; None if its tubelets are not the student's."""
        whole = self.stride == 1 and self.encoder.config.tubelet == self.tubelet
        return super().rows_key if whole else None

    def encode(self, batch: ClipBatch, tokens: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Features at the tokens int64 (B, M), or at all tokens in order if None: (B, M, D).

        The teacher's last block computes only these tokens, unless the features are resampled.
        """
        given = {} if rows is None else {"rows": rows}
        pixels = batch.at(self.input_size)[:, :: self.stride]
        if self.resampler is None:
            features: Tensor = self.teacher(pixels, output_tokens=tokens, **given)
            return features if tokens is not None else features[:, self.extra_tokens :]
        return self.select(self.teacher(pixels, **given)[:, self.extra_tokens :], tokens)
