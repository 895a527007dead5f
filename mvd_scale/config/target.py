"""Section `targets:` of a recipe: the features h that the student predicts, by which head, at which tokens.

Distance and weight are D and lambda of Eq. 2 and 3 of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from mvd_scale.config.model import ModelConfig
from mvd_scale.config.section import Section


class DecoderConfig(Section):
    """Decoder: a shallow transformer over visible and mask tokens (Sec. 3.3, "Decoder")."""

    width: int = Field(gt=0)
    """Number of channels of a decoder token."""

    depth: int = Field(gt=0)
    """Number of transformer blocks."""

    heads: int = Field(gt=0)
    """Number of attention heads; must divide `width`."""

    embed_bias: bool = True
    """Whether the projection from the encoder has a bias. Initial weights follow: with a bias they are Xavier uniform
    (MVD, MAE), without one PyTorch's default (VideoMAE)."""

    drop_path: float | None = Field(default=None, ge=0, lt=1)
    """Drop probability of stochastic depth in the last block; it grows linearly from 0 in the first block.
    `model.drop_path` if omitted, as in MVD."""


class TokenHeadConfig(Section):
    """Head on the tokens of the encoder, without mask tokens (Sec. 4.3, "per-token distillation")."""

    kind: Literal["mlp", "linear"]
    """`mlp`: an MLP with one hidden layer; `linear`: a linear layer."""

    hidden: int | None = Field(default=None, gt=0)
    """Number of channels of the MLP's hidden layer; the width of the encoder if omitted."""


HeadConfig = DecoderConfig | TokenHeadConfig
DecoderKind = tuple[DecoderConfig, bool]
"""Shape of a decoder, and whether it predicts visible tokens too; decoders of one kind can be batched."""
Distance = Literal["smooth_l1", "l1", "l2", "cosine"]
Tokens = Literal["masked", "visible", "all"]


class BaseTarget(Section):
    """Base of all targets."""

    head: Literal["decoder", "mlp", "linear"] = "decoder"
    """Head that predicts the target: a decoder from mask tokens, or an MLP or a linear layer from the encoder's
    tokens."""

    decoder: DecoderConfig | None = None
    """Shape of the decoder; required for `head: decoder`."""

    hidden: int | None = Field(default=None, gt=0)
    """Number of channels of the hidden layer of `head: mlp`; the width of the encoder if omitted."""

    tokens: Tokens = "masked"
    """Tokens at which the target is predicted. `masked`: by a decoder. `visible` (UMT, InternVideo2), or `all` without
    a mask (Sec. 4.3): by an MLP or a linear layer."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the target in the loss, lambda of Eq. 3."""

    visible_weight: float = Field(default=0.0, ge=0)
    """Weight of the distance at visible tokens, which is added to that at masked tokens: the decoder predicts both
    (dense loss of V-JEPA 2.1). 0: masked tokens alone."""

    distance: Distance = "smooth_l1"
    """Distance D of Eq. 2, averaged over tokens and channels. `smooth_l1` has beta 1; `cosine` is 1 minus the cosine
    similarity over the channels of a token."""

    @property
    def head_config(self) -> HeadConfig:
        """Shape of the head."""
        if self.head == "decoder":
            assert self.decoder is not None
            return self.decoder
        return TokenHeadConfig(kind=self.head, hidden=self.hidden)

    @property
    def decoder_kind(self) -> DecoderKind | None:
        """Kind of the decoder; None for another head."""
        return None if self.decoder is None else (self.decoder, bool(self.visible_weight))

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if self.head == "decoder":
            if self.decoder is None:
                raise ValueError(
                    "decoder is missing: `head: decoder`, the default, requires its width, depth and heads"
                )
            if self.tokens != "masked":
                raise ValueError(
                    f"a decoder predicts masked tokens, but tokens is {self.tokens}: use `head: mlp` or `head: linear`"
                )
        else:
            if self.decoder is not None:
                raise ValueError(f"decoder has no effect with `head: {self.head}`: set it to null")
            if self.tokens == "masked":
                raise ValueError(
                    f"`head: {self.head}` takes tokens that the encoder sees, but tokens is masked: give "
                    "`tokens: visible` or `tokens: all`"
                )
            if self.visible_weight:
                raise ValueError(
                    f"visible_weight has no effect with `head: {self.head}`, which predicts no masked tokens: set it "
                    "to 0, or use `head: decoder`"
                )
        if self.hidden is not None and self.head != "mlp":
            raise ValueError(f"hidden has no effect with `head: {self.head}`: it is the hidden width of `head: mlp`")
        return self


class PixelTarget(BaseTarget):
    """Target: the pixels of a token (MAE, VideoMAE)."""

    kind: Literal["pixels"] = "pixels"

    distance: Distance = "l2"
    """Distance D of Eq. 2; squared error in the published runs."""

    normalize: Literal["none", "channel", "patch"] = "channel"
    """Normalisation of the pixels of a token to mean 0 and variance 1: `channel`, per colour channel (VideoMAE);
    `patch`, over all values of the token (MAE); `none`."""


class TeacherTarget(BaseTarget):
    """Base of the targets that are features of a teacher."""

    norm: bool = False
    """Normalise each target feature over its channels (LayerNorm without affine parameters); with `layers` the feature
    of each layer by itself."""

    standardize: Literal["none", "channel", "layer"] = "none"
    """Standardise the features by a running mean of each channel and a running variance over all ranks, so that
    teachers weigh alike in the loss (RADIO): `channel`, of each channel; `layer`, one of all channels of a layer, which
    keeps their proportions. Checkpoints hold both. `none`: features as they are."""

    standardize_momentum: float | None = Field(default=None, ge=0, lt=1)
    """Weight of the old mean and variance in an optimizer step, for `standardize`; 0.99 if omitted."""

    layers: tuple[int, ...] = ()
    """Blocks of the teacher whose outputs are the features, ascending, counted from 1; the last block if empty. The
    student predicts all of them, channels after channels (deep supervision of V-JEPA 2.1; UMT). Later blocks than these
    are not computed."""

    @model_validator(mode="after")
    def _check_standardize(self) -> Self:
        if self.norm and self.standardize != "none":
            raise ValueError(
                f"norm and standardize {self.standardize} both scale the features: set one of them to "
                "`norm: false` or `standardize: none`"
            )
        if self.standardize == "none" and self.standardize_momentum is not None:
            raise ValueError(
                "standardize_momentum has no effect with `standardize: none`: remove it, or set `standardize: channel` "
                "or `standardize: layer`"
            )
        return self

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if layers != tuple(sorted(set(layers))) or min(layers, default=1) < 1:
            raise ValueError(
                f"layers {', '.join(map(str, layers))}: expected numbers of blocks from 1, each once and ascending"
            )
        return layers


class FrozenTeacherTarget(TeacherTarget):
    """Base of the targets of a frozen teacher from a file, which sees frames at an input size of its own."""

    input_size: int | None = Field(default=None, gt=0)
    """Side in pixels of the frames that the teacher sees. If omitted: that of its checkpoint; for a model of timm the
    one that gives the token grid of the student."""

    resample: bool = False
    """Resample the teacher's features from its token grid to the student's where they differ, linearly in time, height
    and width; each feature is then a weighted mean of those around its place. Without it, grids must agree."""

    final_norm: bool = False
    """Apply the model's norm after the last block, as published features of V-JEPA 2 and DINOv3 do; those of the
    paper's teachers are the output of the last block. With `layers` it is applied to each of them; V-JEPA 2.1,
    which has a norm for each, refuses that."""


class TrainedTeacherTarget(FrozenTeacherTarget):
    """Base of the targets of a frozen teacher in one of the formats that `mvd-scale inspect` knows."""

    checkpoint: Path | None = None
    """Weights of the frozen teacher: `encoder.safetensors` of a finished run, or a published file."""

    model: ModelConfig | None = None
    """Shape that the checkpoint must have; any shape if omitted. Benchmarks build a teacher of this shape."""


class ImageTeacherTarget(TrainedTeacherTarget):
    """Target: features of a frozen image model on the first frame of every tubelet."""

    kind: Literal["image_teacher"] = "image_teacher"


class VideoTeacherTarget(TrainedTeacherTarget):
    """Target: features of a frozen video model on the whole clip."""

    kind: Literal["video_teacher"] = "video_teacher"

    frames: int | None = Field(default=None, gt=0)
    """Number of frames of the clip that the teacher sees: every n-th from the first one on. If omitted: as many as its
    checkpoint takes; all for a model with rotary positions, which takes any number."""


class TimmTarget(FrozenTeacherTarget):
    """Target: patch token features of a vision transformer of timm on the first frame of every tubelet.

    The teacher sees frames normalised by its own mean and standard deviation.
    """

    kind: Literal["timm"] = "timm"

    vit: str
    """Name of the model in timm, such as `vit_large_patch14_dinov2`."""

    checkpoint: Path | None = None
    """Weights of the teacher in timm's names; if omitted, timm downloads the pre-trained weights."""


class MomentumTarget(TeacherTarget):
    """Target: features of an exponential moving average of the student's encoder on the whole clip (Table 8)."""

    kind: Literal["momentum"] = "momentum"

    momentum: float = Field(default=0.996, ge=0, lt=1)
    """Decay of the moving average at the first step."""

    momentum_end: float = Field(default=1.0, ge=0, le=1)
    """Decay of the moving average at the last step of the schedule, reached along half a cosine."""


TargetConfig = Annotated[
    PixelTarget | ImageTeacherTarget | VideoTeacherTarget | TimmTarget | MomentumTarget, Field(discriminator="kind")
]


def group_decoders(kinds: Mapping[str, DecoderKind | None]) -> list[list[str]]:
    """Group decoders that can be batched, by name of the target: names of at least two in each group."""
    groups: dict[DecoderKind, list[str]] = {}
    for name, kind in kinds.items():
        if kind is not None:
            groups.setdefault(kind, []).append(name)
    return [group for group in groups.values() if len(group) > 1]
