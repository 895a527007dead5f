"""`targets:` - what the student predicts: h, head, tokens, distance and weight of Eq. 2 and 3."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

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


class TokenHeadConfig(Section):
    """A head on the encoder's own tokens, without mask tokens (Sec. 4.3, "per-token distillation")."""

    kind: Literal["mlp", "linear"]
    """`mlp` has one hidden layer."""

    hidden: int | None = Field(default=None, gt=0)
    """Channels of the MLP's hidden layer; the encoder's width if left out."""


HeadConfig = DecoderConfig | TokenHeadConfig
Distance = Literal["smooth_l1", "l1", "l2", "cosine"]
Tokens = Literal["masked", "visible", "all"]


class AnyTarget(Section):
    """What all targets have in common."""

    head: Literal["decoder", "mlp", "linear"] = "decoder"
    """What predicts this target: a decoder from mask tokens, or an MLP or a linear layer from the encoder's tokens."""

    decoder: DecoderConfig | None = None
    """Shape of the decoder."""

    hidden: int | None = Field(default=None, gt=0)
    """Channels of the hidden layer of `head: mlp`; the encoder's width if left out."""

    tokens: Tokens = "masked"
    """Where it is predicted: at masked tokens by a decoder; at visible ones (UMT, InternVideo2) or, without a mask, at
    all of them (Sec. 4.3) by the other heads."""

    weight: float = Field(default=1.0, gt=0)
    """Lambda of Eq. 3."""

    distance: Distance = "smooth_l1"
    """D of Eq. 2, averaged over tokens and channels; smooth L1 has beta 1, cosine is 1 minus the cosine of a token's
    channels."""

    @property
    def head_config(self) -> HeadConfig:
        """Shape of the head."""
        if self.head == "decoder":
            assert self.decoder is not None
            return self.decoder
        return TokenHeadConfig(kind=self.head, hidden=self.hidden)

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if self.head == "decoder":
            if self.decoder is None:
                raise ValueError("decoder is missing: `head: decoder`, the default, needs its width, depth and heads")
            if self.tokens != "masked":
                raise ValueError(
                    f"a decoder predicts masked tokens, not tokens {self.tokens}: use `head: mlp` or `linear`"
                )
        else:
            if self.decoder is not None:
                raise ValueError(f"decoder does nothing with `head: {self.head}`: set it to null")
            if self.tokens == "masked":
                raise ValueError(
                    f"`head: {self.head}` sits on tokens that the encoder sees: give `tokens: visible` or `tokens: all`"
                )
        if self.hidden is not None and self.head != "mlp":
            raise ValueError(f"hidden does nothing with `head: {self.head}`: it is the width of an MLP")
        return self


class PixelTarget(AnyTarget):
    """The pixels of a token (MAE, VideoMAE)."""

    kind: Literal["pixels"] = "pixels"

    distance: Distance = "l2"
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


class MomentumTarget(TeacherTarget):
    """Features of an exponential moving average of the student's own encoder on the whole clip (Table 8)."""

    kind: Literal["momentum"] = "momentum"

    momentum: float = Field(default=0.996, ge=0, lt=1)
    """Share of the average that a step keeps, at the first step."""

    momentum_end: float = Field(default=1.0, ge=0, le=1)
    """The same at the last step of the schedule, reached by half a cosine."""


TargetConfig = Annotated[
    PixelTarget | ImageTeacherTarget | VideoTeacherTarget | TimmTarget | MomentumTarget, Field(discriminator="kind")
]
