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

    norm: bool = False
    """Normalise each target feature over its channels (LayerNorm without affine)."""


class TrainedTeacherTarget(TeacherTarget):
    """A teacher in one of the formats that `mvd-scale inspect` knows."""

    checkpoint: Path | None = None
    """Weights of the frozen teacher: a finished run's `encoder.safetensors`, or a published file."""

    model: ModelConfig | None = None
    """Shape that the checkpoint must have; its own counts if left out. Benchmarks build the teacher from this one."""


class ImageTeacherTarget(TrainedTeacherTarget):
    """Features of a frozen image model on the front frame of every tubelet."""

    kind: Literal["image_teacher"] = "image_teacher"


class VideoTeacherTarget(TrainedTeacherTarget):
    """Features of a frozen video model."""

    kind: Literal["video_teacher"] = "video_teacher"


class TimmTarget(TeacherTarget):
    """Features of any vision transformer of timm on the front frame of every tubelet; patch tokens only.

    It sees the frames at the input size that gives the student's token grid, whitened by its own mean and std.
    """

    kind: Literal["timm"] = "timm"

    vit: str
    """Name of the model in timm, such as `vit_large_patch14_dinov2`."""

    checkpoint: Path | None = None
    """Its weights in timm's own names; left out, timm fetches the pre-trained ones."""

    input_size: int | None = Field(default=None, gt=0)
    """Side in pixels, to be checked against the student's grid; follows from the grid if left out."""

    final_norm: bool = False
    """Keep the model's norm after the last block."""


TargetConfig = Annotated[
    PixelTarget | ImageTeacherTarget | VideoTeacherTarget | TimmTarget, Field(discriminator="kind")
]
