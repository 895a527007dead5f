"""Encoders of I-JEPA, V-JEPA (facebookresearch/ijepa, jepa) and DINO (facebookresearch/dino), which can be read only.

The names are timm's. The files hold the position table, so that nothing has to be guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mvd_scale.checkpoints.formats.format import patch_axes
from mvd_scale.checkpoints.formats.timm import TIMM


def _recognise_v_jepa(tensors: Mapping[str, Tensor]) -> bool:
    fused = any(name.endswith("attn.qkv.bias") for name in tensors)
    clips = patch_axes(tensors, "patch_embed.proj.weight") == 5
    return clips and fused and "pos_embed" in tensors and "cls_token" not in tensors


def _recognise_i_jepa(tensors: Mapping[str, Tensor]) -> bool:
    return TIMM.recognise(tensors) and "pos_embed" in tensors and "cls_token" not in tensors


def _recognise_dino(tensors: Mapping[str, Tensor]) -> bool:
    return TIMM.recognise(tensors) and any(name.startswith("head.last_layer.") for name in tensors)


V_JEPA = replace(TIMM, name="v-jepa", recognise=_recognise_v_jepa, positions="sincos3d", image=False)
I_JEPA = replace(TIMM, name="i-jepa", recognise=_recognise_i_jepa)
"""timm's models without a class token have the same names."""

DINO = replace(TIMM, name="dino", recognise=_recognise_dino)
