"""V-JEPA 2 and 2.1 (facebookresearch/vjepa2) and Hugging Face `VJEPA2Model`: encoders, which can be read only.

All have rotary positions. V-JEPA 2.1 has a patch embedding for images beside that for clips, adds a vector to the
tokens of either, and has a norm for each of four blocks, of which the last one is that of its features. Its files are
models of images if one frame is asked for, else of clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Hints
from mvd_scale.checkpoints.formats.format import FUSED_LEAVES, Format, int_or_none, patch_axes
from mvd_scale.checkpoints.formats.names import Table
from mvd_scale.checkpoints.formats.videomae import has_split_biases

_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 22, 1664: 26}
_FRAMES = 64
_CLIP_PATCHES, _IMAGE_PATCHES = "patch_embed.proj.", "patch_embed_img.proj."
_CLIP_VECTOR, _IMAGE_VECTOR = "video_mod_embed", "img_mod_embed"
_HF_PATCHES = "encoder.embeddings.patch_embeddings.proj."
_BLOCKS: Table = (("blocks.", "encoder.blocks."),)
_MODULES: Table = ((_CLIP_PATCHES, "encoder.patch_embed."), *_BLOCKS)
_NORM: Table = (("norms_block.3.", "encoder.norm."),)


def is_fused_clip_model(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds a model of clips with biases of the keys, which VideoMAE and MVD lack."""
    biased = any(name.endswith("attn.qkv.bias") for name in tensors)
    return patch_axes(tensors, "patch_embed.proj.weight") == 5 and biased and not has_split_biases(tensors)


def _recognise_2(tensors: Mapping[str, Tensor]) -> bool:
    added = {"pos_embed", "cls_token", "head.weight", "fc_norm.weight"}
    return is_fused_clip_model(tensors) and "norm.weight" in tensors and added.isdisjoint(tensors)


def _recognise_2_1(tensors: Mapping[str, Tensor]) -> bool:
    return is_fused_clip_model(tensors) and any(name.startswith("norms_block.") for name in tensors)


def _recognise_hf(tensors: Mapping[str, Tensor]) -> bool:
    return patch_axes(tensors, f"{_HF_PATCHES}weight", f"vjepa2.{_HF_PATCHES}weight") == 5


def _merge_vector(tensors: Mapping[str, Tensor], patches: str, name: str) -> dict[str, Tensor]:
    """Add the vector `name`, which all tokens get, to the bias of a patch embedding."""
    merged, vector, bias = dict(tensors), tensors.get(name), tensors.get(f"{patches}bias")
    if vector is not None and bias is not None and vector.flatten().shape == bias.shape:
        merged[f"{patches}bias"] = bias + merged.pop(name).flatten()
    return merged


def _merge_clip_vector(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _merge_vector(tensors, _CLIP_PATCHES, _CLIP_VECTOR)


def _merge_image_vector(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _merge_vector(tensors, _IMAGE_PATCHES, _IMAGE_VECTOR)


def _facts(config: Mapping[str, Any]) -> Hints:
    return Hints(
        heads=int_or_none(config, "num_attention_heads"),
        frames=int_or_none(config, "frames_per_clip"),
        input_size=int_or_none(config, "crop_size"),
    )


V_JEPA_2 = Format(
    name="v-jepa 2",
    recognise=_recognise_2,
    modules=(*_MODULES, ("norm.", "encoder.norm.")),
    leaves=FUSED_LEAVES,
    attention="fused",
    positions="rotary_vjepa2",
    kinds=("encoder",),
    heads=_HEADS,
    frames=_FRAMES,
    input_size=256,
    # A table that a file may hold, and that the code does not add.
    ignored=("pos_embed",),
)

V_JEPA_2_1 = Format(
    name="v-jepa 2.1",
    recognise=_recognise_2_1,
    modules=(*_MODULES, *_NORM),
    leaves=FUSED_LEAVES,
    attention="fused",
    positions="rotary_vjepa2_1",
    kinds=("encoder",),
    heads=_HEADS,
    frames=_FRAMES,
    input_size=384,
    prepare=_merge_clip_vector,
    ignored=("norms_block.", _IMAGE_PATCHES, _IMAGE_VECTOR),
)

V_JEPA_2_1_IMAGES = replace(
    V_JEPA_2_1,
    name="v-jepa 2.1, images",
    modules=((_IMAGE_PATCHES, "encoder.patch_embed."), *_BLOCKS, *_NORM),
    frames=1,
    prepare=_merge_image_vector,
    ignored=("norms_block.", _CLIP_PATCHES, _CLIP_VECTOR),
)

HF_VJEPA2 = Format(
    name="hf_vjepa2",
    recognise=_recognise_hf,
    modules=tuple(
        (prefix + theirs, ours)
        for prefix in ("vjepa2.", "")
        for theirs, ours in (
            (_HF_PATCHES, "encoder.patch_embed."),
            ("encoder.layer.", "encoder.blocks."),
            ("encoder.layernorm.", "encoder.norm."),
        )
    ),
    leaves=(
        ("attention.query.", "attn.q."),
        ("attention.key.", "attn.k."),
        ("attention.value.", "attn.v."),
        ("attention.proj.", "attn.proj."),
        ("", ""),
    ),
    attention="separate",
    positions="rotary_vjepa2",
    kinds=("encoder",),
    heads=_HEADS,
    frames=_FRAMES,
    input_size=256,
    facts=_facts,
    ignored=tuple(prefix + name for prefix in ("vjepa2.", "") for name in ("predictor.", "pooler.", "classifier.")),
)
