"""timm's plain vision transformers (`vit_*`), among them MAE's encoder-only files, which have the same names."""

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
    # Image classes: no head of ours reads a class token.
    ignored=("head.", "fc_norm."),
)
