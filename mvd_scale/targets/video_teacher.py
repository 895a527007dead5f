"""Spatial-temporal targets: features of a frozen video model (Sec. 3.2, 3.3)."""

from __future__ import annotations

from mvd_scale.config import ModelConfig, VideoTeacherTarget
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.targets.target import EncoderTeacher


class VideoTeacher(EncoderTeacher):
    """Target whose teacher sees the whole, unmasked clip.

    Raises:
        UserError: the teacher's frames or token grid differ from the student's.
    """

    def __init__(self, name: str, config: VideoTeacherTarget, teacher: Encoder, student: ModelConfig) -> None:
        super().__init__(config, teacher, student.tubelet)
        if teacher.config.frames != student.frames or teacher.config.grid != student.grid:
            raise UserError(
                f"targets.{name}: the teacher takes {teacher.config.frames} frames into a grid of "
                f"{'x'.join(map(str, teacher.config.grid))} tokens, the student {student.frames} frames into "
                f"{'x'.join(map(str, student.grid))}; both must agree"
            )
