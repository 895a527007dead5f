"""Renaming between a published format and ours in both directions, and conversion between forms of attention weights.

A table is a sequence of pairs (theirs, ours) of name prefixes; the first prefix that matches is replaced. If several
of theirs map to one of ours, the first of them is written on export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Table = tuple[tuple[str, str], ...]
AttentionForm = Literal["split", "fused", "separate"]
"""`split`: q_bias and v_bias (VideoMAE, MVD); `fused`: one bias for q, k and v (MAE, timm); `separate`: three layers
(Hugging Face)."""

_BLOCKS = "blocks."


def to_native_name(name: str, modules: Table, leaves: Table) -> str | None:
    """Return our name of a published tensor, or None if the tables do not contain it."""
    ours = _rename(name, modules)
    return _rename_leaf(ours, leaves) if ours is not None else None


def to_published_name(name: str, modules: Table, leaves: Table) -> str | None:
    """Return the published name of one of our tensors, or None if the format has no such tensor."""
    leaf_renamed = _rename_leaf(name, _flip(leaves))
    return _rename(leaf_renamed, _flip(modules)) if leaf_renamed is not None else None


def pack_attention(tensors: Mapping[str, Tensor], *, key_bias: bool = False) -> dict[str, Tensor]:
    """Convert any form of attention to ours: one packed weight, and biases for query and value.

    A bias of the keys adds the same number to all scores of a query, which the softmax cancels: it is dropped without
    any change of the output, unless rotary positions turn it (`key_bias`).
    """
    packed = dict(tensors)
    for name in tensors:
        start, end = name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :]
        if start.endswith("attn.qkv.") and end == "bias":
            packed[start + "q_bias"], of_keys, packed[start + "v_bias"] = packed.pop(name).chunk(3)
            if key_bias:
                packed[start + "k_bias"] = of_keys
        elif start.endswith("attn.q."):
            attention = start.removesuffix("q.")
            parts = [f"{attention}{part}.weight" for part in "qkv"]
            if end == "weight" and all(part in packed for part in parts):
                packed[attention + "qkv.weight"] = torch.cat([packed.pop(part) for part in parts])
            elif end == "bias":
                packed[attention + "qkv.q_bias"] = packed.pop(name)
                of_separate_keys = packed.pop(attention + "k.bias", None)
                if key_bias and of_separate_keys is not None:
                    packed[attention + "qkv.k_bias"] = of_separate_keys
        elif start.endswith("attn.v.") and end == "bias":
            packed[start.removesuffix("v.") + "qkv.v_bias"] = packed.pop(name)
    return packed


def unpack_attention(tensors: Mapping[str, Tensor], form: AttentionForm, *, key_bias: bool) -> dict[str, Tensor]:
    """Convert our form of attention to another.

    Args:
        tensors: tensors by our names.
        form: the form to convert to.
        key_bias: with `separate`, add a bias of zeros for the keys.
    """
    if form == "split":
        return dict(tensors)
    unpacked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        attention, here, part = name.partition("attn.qkv.")
        attention += "attn."
        if not here:
            unpacked[name] = tensor
        elif form == "fused" and part == "q_bias":
            value = tensors[f"{attention}qkv.v_bias"]
            unpacked[f"{attention}qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), value])
        elif form == "fused" and part == "weight":
            unpacked[name] = tensor
        elif form == "separate" and part == "weight":
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                unpacked[f"{attention}{letter}.weight"] = piece
        elif form == "separate":
            unpacked[f"{attention}{part[0]}.bias"] = tensor
            if part == "q_bias" and key_bias:
                unpacked[f"{attention}k.bias"] = torch.zeros_like(tensor)
    return unpacked


def _rename(name: str, table: Table) -> str | None:
    return next((new + name[len(old) :] for old, new in table if name.startswith(old)), None)


def _rename_leaf(name: str, leaves: Table) -> str | None:
    before, blocks, inside = name.partition(_BLOCKS)
    if not blocks:
        return name
    number, _, leaf = inside.partition(".")
    renamed = _rename(leaf, leaves)
    return f"{before}{blocks}{number}.{renamed}" if renamed is not None else None


def _flip(table: Table) -> Table:
    return tuple((new, old) for old, new in table)
