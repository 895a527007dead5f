"""MAE (facebookresearch/mae `models_mae.py`): an image encoder with class token, and its pixel decoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mvd_scale.checkpoints.formats.format import FUSED_LEAVES, Format, patch_axes


def _recognise(tensors: Mapping[str, Tensor]) -> bool:
    return patch_axes(tensors, "patch_embed.proj.weight") == 4 and "decoder_embed.weight" in tensors


MAE = Format(
    name="mae",
    recognise=_recognise,
    modules=(
        ("patch_embed.proj.", "encoder.patch_embed."),
        ("cls_token", "encoder.class_token"),
        ("pos_embed", "encoder.positions"),
        ("blocks.", "encoder.blocks."),
        ("norm.", "encoder.norm."),
        ("decoder_embed.", "decoders.pixels.embed."),
        ("mask_token", "decoders.pixels.mask_token"),
        ("decoder_pos_embed", "decoders.pixels.positions"),
        ("decoder_blocks.", "decoders.pixels.blocks."),
        ("decoder_norm.", "decoders.pixels.norm."),
        ("decoder_pred.", "decoders.pixels.head."),
    ),
    leaves=FUSED_LEAVES,
    attention="fused",
    positions="sincos2d",
    kinds=("encoder", "student"),
    image=True,
    stores_positions=True,
)
