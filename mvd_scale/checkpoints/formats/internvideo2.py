"""InternVideo2 (OpenGVLab/InternVideo): the encoder of any stage, which can be read only.

The scale of each residual branch (LayerScale) is multiplied into the layer before it, which computes the same but for
rounding. The pooling by attention and the heads on it are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mvd_scale.checkpoints.formats.format import FUSED_LEAVES, Format, patch_axes

_SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
_SPACE, _TIME, _CLASS = "pos_embed_spatial", "pos_embed_temporal", "pos_embed_cls"


def _recognise(tensors: Mapping[str, Tensor]) -> bool:
    normed = any(name.endswith("attn.q_norm.weight") for name in tensors)
    biased = any(name.endswith("attn.qkv.bias") for name in tensors)
    return patch_axes(tensors, "patch_embed.proj.weight") == 5 and normed and not biased


def _prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply scales into layers, add biases of zeros, and sum separate position tables to one (1, 1 + N, D)."""
    merged = dict(tensors)
    for name, tensor in tensors.items():
        block, _, leaf = name.partition(".ls")
        layer = f"{block}.{_SCALED.get(f'ls{leaf}')}"
        parts = [f"{layer}.{part}" for part in ("weight", "bias") if f"{layer}.{part}" in tensors]
        if parts and all(tensors[part].shape[:1] == tensor.shape for part in parts):
            gamma = merged.pop(name).float()
            for part in parts:
                scaled = tensors[part]
                merged[part] = (gamma.view(-1, *[1] * (scaled.ndim - 1)) * scaled).to(scaled.dtype)
        if name.endswith("attn.qkv.weight"):
            start = name.removesuffix("weight")
            merged |= {f"{start}{part}_bias": tensor.new_zeros(tensor.shape[-1]) for part in "qv"}
    tables = [tensors[name] for name in (_SPACE, _TIME, _CLASS) if name in tensors]
    if len({table.shape[2:] for table in tables}) == 1 and [table.ndim for table in tables] == [3, 3, 3]:
        space, time, of_class = (merged.pop(name)[0] for name in (_SPACE, _TIME, _CLASS))
        merged["pos_embed"] = torch.cat([of_class, (time.unsqueeze(1) + space).flatten(0, 1)]).unsqueeze(0)
    return merged


INTERNVIDEO2 = Format(
    name="internvideo2",
    recognise=_recognise,
    modules=(
        ("patch_embed.proj.", "encoder.patch_embed."),
        ("cls_token", "encoder.class_token"),
        ("pos_embed", "encoder.positions"),
        ("blocks.", "encoder.blocks."),
    ),
    leaves=FUSED_LEAVES,
    attention="fused",
    positions="sincos3d",
    kinds=("encoder",),
    heads={1408: 16, 3200: 25},
    frames=8,
    prepare=_prepare,
    stores_positions=True,
    ignored=("clip_", "mae_", "final_clip_decoder.", "img_pos_embed", "fc_norm.", "head."),
)
