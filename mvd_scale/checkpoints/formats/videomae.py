"""VideoMAE and VideoMAE V2 (MCG-NJU/VideoMAE, OpenGVLab/VideoMAEv2): pre-training files with encoder and pixel decoder;
encoders and fine-tuned classifiers.

ViT-g of VideoMAE V2 has patches of 14 pixels, which no model of VideoMAE or MVD has. No file contains a position table:
VideoMAE's code adds a sinusoid over the token index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mvd_scale.checkpoints.formats.format import SPLIT_LEAVES, Format, patch_axes
from mvd_scale.checkpoints.formats.names import Table

_HEADS = {1408: 16}
_SIDE = 224
_PATCHES = "patch_embed.proj.weight"

FINETUNED_MODULES: Table = (
    ("patch_embed.proj.", "encoder.patch_embed."),
    ("blocks.", "encoder.blocks."),
    ("norm.", "encoder.norm."),
    ("fc_norm.", "norm."),
    ("head.", "head."),
)
"""Names of fine-tuned classifiers, which are identical in VideoMAE and MVD."""


def _recognise(tensors: Mapping[str, Tensor]) -> bool:
    return patch_axes(tensors, "encoder.patch_embed.proj.weight") == 5 and "encoder_to_decoder.weight" in tensors


def _recognise_encoder(tensors: Mapping[str, Tensor]) -> bool:
    return patch_axes(tensors, "patch_embed.proj.weight") == 5


def _recognise_giant(tensors: Mapping[str, Tensor]) -> bool:
    patches = tensors.get(_PATCHES)
    return has_split_biases(tensors) and patches is not None and patches.ndim == 5 and patches.shape[-1] == 14


def has_split_biases(tensors: Mapping[str, Tensor]) -> bool:
    """Whether queries and values have biases of their own, as in VideoMAE, MVD and UMT."""
    return any(name.endswith("attn.q_bias") for name in tensors)


VIDEOMAE = Format(
    name="videomae",
    recognise=_recognise,
    modules=(
        ("encoder.patch_embed.proj.", "encoder.patch_embed."),
        ("encoder.blocks.", "encoder.blocks."),
        ("encoder.norm.", "encoder.norm."),
        ("encoder_to_decoder.weight", "decoders.pixels.embed.weight"),
        ("mask_token", "decoders.pixels.mask_token"),
        ("decoder.", "decoders.pixels."),
    ),
    leaves=SPLIT_LEAVES,
    attention="split",
    positions="sinusoid",
    kinds=("student",),
    heads=_HEADS,
    input_size=_SIDE,
)

VIDEOMAE_FINETUNED = Format(
    name="videomae",
    recognise=_recognise_encoder,
    modules=FINETUNED_MODULES,
    leaves=SPLIT_LEAVES,
    attention="split",
    positions="sinusoid",
    kinds=("encoder", "classifier"),
    heads=_HEADS,
    input_size=_SIDE,
)

VIDEOMAE_V2_GIANT = replace(VIDEOMAE_FINETUNED, recognise=_recognise_giant)
