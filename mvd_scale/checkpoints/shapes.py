"""Inference of a model's shape from the shapes of its tensors; published tables supply what these do not determine."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mvd_scale.checkpoints.checkpoint import DecoderWeights, Hints, TokenHeadWeights
from mvd_scale.config import SIZES, DecoderConfig, TokenHeadConfig
from mvd_scale.errors import UserError

_DECODER_HEADS = {512: 8, 640: 8}
"""Attention heads of the decoders of VideoMAE and MVD by width; all other decoders have heads of 64 channels."""

_IMAGE_DECODER_HEADS = {512: 16}
"""Attention heads of the decoder of MAE by width."""


def select_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def infer_depth(tensors: Mapping[str, Tensor], where: str) -> int:
    """Number of blocks of a stack: one more than the highest block index among its names.

    Raises:
        UserError: the names contain no blocks.
    """
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
    if not numbers:
        raise UserError(f"{where} has no blocks: expected the weights of a vision transformer")
    return max(numbers) + 1


def infer_mlp_ratio(tensors: Mapping[str, Tensor], width: int) -> float:
    """Hidden width of the first block's MLP divided by the width; 4, as published, if there is no such tensor."""
    weight = tensors.get("blocks.0.mlp.fc1.weight")
    return len(weight) / width if weight is not None else 4.0


def encoder_heads(width: int, where: str) -> int:
    """Attention heads of the published model size that has this width.

    Raises:
        UserError: no published size has this width.
    """
    for published, _, heads in SIZES.values():
        if width == published:
            return heads
    raise UserError(
        f"{where} has width {width}, which is none of the published sizes, so its attention heads are unknown: "
        "give them with `--heads`"
    )


def decoder_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the tensors `decoders.NAME.*` by target name; their names lose that prefix."""
    names = dict.fromkeys(name.split(".")[1] for name in tensors if re.match(r"decoders\.[^.]+\.", name))
    return {name: select_prefix(tensors, f"decoders.{name}.") for name in names}


def infer_decoder(tensors: Mapping[str, Tensor], hints: Hints, where: str, *, image: bool) -> DecoderWeights:
    """Infer the shape of one decoder from its tensors.

    Args:
        tensors: tensors by the names of `Decoder`.
        hints: supplies the number of attention heads, which shapes do not determine.
        where: file and decoder, for messages.
        image: whether the encoder is an image model (MAE).

    Raises:
        UserError: the tensors that determine width and channels are missing, or the number of heads is unknown.
    """
    embed, head = tensors.get("embed.weight"), tensors.get("head.weight")
    if embed is None or head is None:
        raise UserError(f"{where} lacks its {'embedding' if embed is None else 'head'}: its shape is unknown")
    width = len(embed)
    table = {**_DECODER_HEADS, **_IMAGE_DECODER_HEADS} if image else _DECODER_HEADS
    heads = hints.decoder_heads or table.get(width) or (width // 64 if width % 64 == 0 else 0)
    if not heads:
        raise UserError(
            f"{where} has width {width}, which is none of the published ones, so its attention heads are unknown: "
            "give them with `--decoder-heads`"
        )
    config = DecoderConfig(
        width=width, depth=infer_depth(tensors, where), heads=heads, embed_bias="embed.bias" in tensors
    )
    return DecoderWeights(config, len(head), tensors)


def token_heads(tensors: Mapping[str, Tensor]) -> dict[str, TokenHeadWeights]:
    """Collect the heads on the encoder's tokens among the tensors of a student of this project, by target name."""
    found = {}
    for name in sorted({name.split(".")[1] for name in tensors if name.startswith("heads.")}):
        weights = select_prefix(tensors, f"heads.{name}.")
        if "layers.weight" in weights:
            found[name] = TokenHeadWeights(TokenHeadConfig(kind="linear"), len(weights["layers.weight"]), weights)
        elif {"layers.0.weight", "layers.2.weight"} <= weights.keys():
            shape = TokenHeadConfig(kind="mlp", hidden=len(weights["layers.0.weight"]))
            found[name] = TokenHeadWeights(shape, len(weights["layers.2.weight"]), weights)
    return found
