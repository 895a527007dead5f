"""MVD (ruiwang2021/mvd): the student with its two decoders, and fine-tuned classifiers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mvd_scale.checkpoints.formats.format import SPLIT_LEAVES, Format, patch_axes
from mvd_scale.checkpoints.formats.names import Table
from mvd_scale.checkpoints.formats.videomae import FINETUNED_MODULES


def _decoder(theirs: str, ours: str) -> Table:
    return (
        (f"down_{theirs}.", f"decoders.{ours}.embed."),
        (f"mask_token_{theirs}", f"decoders.{ours}.mask_token"),
        (f"pos_embed_{theirs}", f"decoders.{ours}.positions"),
        (f"decoder_{theirs}.", f"decoders.{ours}."),
    )


def _recognise(tensors: Mapping[str, Tensor]) -> bool:
    marks = {"pos_embed", "down_img.weight", "down_vid.weight"}
    return patch_axes(tensors, "patch_embed.proj.weight") == 5 and not marks.isdisjoint(tensors)


def _recognise_classifier(tensors: Mapping[str, Tensor]) -> bool:
    return patch_axes(tensors, "patch_embed.proj.weight") == 5 and "head.weight" in tensors


MVD = Format(
    name="mvd",
    recognise=_recognise,
    modules=(
        *_decoder("img", "image"),
        *_decoder("vid", "video"),
        ("patch_embed.proj.", "encoder.patch_embed."),
        ("pos_embed", "encoder.positions"),
        ("blocks.", "encoder.blocks."),
        ("norm.", "encoder.norm."),
    ),
    leaves=SPLIT_LEAVES,
    attention="split",
    positions="sincos3d",
    kinds=("encoder", "student"),
    stores_positions=True,
)

MVD_CLASSIFIER = Format(
    name="mvd",
    recognise=_recognise_classifier,
    modules=FINETUNED_MODULES,
    leaves=SPLIT_LEAVES,
    attention="split",
    positions="sincos3d",
    kinds=("classifier",),
)
