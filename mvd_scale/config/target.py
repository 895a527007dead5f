"""`targets:` - what the student predicts: h, head, tokens, distance and weight of Eq. 2 and 3."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mvd_scale.config.model import ModelConfig
from mvd_scale.config.section import Section


class DecoderConfig(Section):
    """A shallow transformer over visible and mask tokens (Sec. 3.3, "Decoder")."""

    width: int = Field(gt=0)
    """Channels of a decoder token."""

    depth: int = Field(gt=0)
    """Number of blocks."""

    heads: int = Field(gt=0)
    """Attention heads; must divide `width`."""

    embed_bias: bool = True
    """Bias of the projection from the encoder (MVD, MAE: yes; VideoMAE: no)."""


class AnyTarget(Section):
    """What all targets have in common."""

    decoder: DecoderConfig
    """The decoder that predicts this target."""

    weight: float = Field(default=1.0, gt=0)
    """Lambda of Eq. 3."""

    distance: Literal["smooth_l1", "l1", "l2"] = "smooth_l1"
    """D of Eq. 2, averaged over tokens and channels; smooth L1 has beta 1."""


class PixelTarget(AnyTarget):
    """The pixels of a token (MAE, VideoMAE)."""

    kind: Literal["pixels"] = "pixels"

    distance: Literal["smooth_l1", "l1", "l2"] = "l2"
    """D of Eq. 2; squared error in the published runs."""

    normalize: Literal["none", "channel", "patch"] = "channel"
    """Statistics taken out of a token: per colour channel (VideoMAE), over all its values (MAE), or none."""


class TeacherTarget(AnyTarget):
    """What targets of frozen teachers have in common."""

    checkpoint: Path | None = None
    """Weights of the frozen teacher: the `encoder.safetensors` of a finished run."""

    model: ModelConfig | None = None
    """Shape that the checkpoint must have; its own counts if left out. Benchmarks build the teacher from this one."""

    norm: bool = False
    """Normalise each target feature over its channels (LayerNorm without affine)."""


class ImageTeacherTarget(TeacherTarget):
    """Features of a frozen image model on the front frame of every tubelet."""

    kind: Literal["image_teacher"] = "image_teacher"


class VideoTeacherTarget(TeacherTarget):
    """Features of a frozen video model."""

    kind: Literal["video_teacher"] = "video_teacher"


TargetConfig = Annotated[PixelTarget | ImageTeacherTarget | VideoTeacherTarget, Field(discriminator="kind")]
