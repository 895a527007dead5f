"""VideoMAE (MCG-NJU/VideoMAE): pre-training files with encoder and pixel decoder; encoders and fine-tuned classifiers.

Neither kind of file contains a position table: VideoMAE's code adds a sinusoid over the token index.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mvd_scale.checkpoints.formats.format import SPLIT_LEAVES, Format, patch_axes
from mvd_scale.checkpoints.formats.names import Table

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
)

VIDEOMAE_FINETUNED = Format(
    name="videomae",
    recognise=_recognise_encoder,
    modules=FINETUNED_MODULES,
    leaves=SPLIT_LEAVES,
    attention="split",
    positions="sinusoid",
    kinds=("encoder", "classifier"),
)
