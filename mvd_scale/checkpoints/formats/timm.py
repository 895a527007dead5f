"""timm's plain vision transformers (`vit_*`); the encoder-only files of MAE have the same names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mvd_scale.checkpoints.formats.format import FUSED_LEAVES, Format, patch_axes


def _recognise(tensors: Mapping[str, Tensor]) -> bool:
    return patch_axes(tensors, "patch_embed.proj.weight") == 4


TIMM = Format(
    name="timm",
    recognise=_recognise,
    modules=(
        ("patch_embed.proj.", "encoder.patch_embed."),
        ("cls_token", "encoder.class_token"),
        ("pos_embed", "encoder.positions"),
        ("blocks.", "encoder.blocks."),
        ("norm.", "encoder.norm."),
    ),
    leaves=FUSED_LEAVES,
    attention="fused",
    positions="sincos2d",
    kinds=("encoder",),
    image=True,
    stores_positions=True,
    # Heads of image classification: no head of this project reads the class token.
    ignored=("head.", "fc_norm."),
)
