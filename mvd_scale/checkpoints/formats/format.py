"""What a published format is: its names, how its attention is written, which positions its code adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Checkpoint, Hints, Kind
from mvd_scale.checkpoints.formats.names import AttentionForm, Table
from mvd_scale.config.model import Positions

SPLIT_LEAVES: Table = (("attn.q_bias", "attn.qkv.q_bias"), ("attn.v_bias", "attn.qkv.v_bias"), ("", ""))
"""Names within a block of VideoMAE and MVD."""

FUSED_LEAVES: Table = (("", ""),)
"""Names within a block of MAE and timm."""

HF_LEAVES: Table = (
    ("attention.attention.query.", "attn.q."),
    ("attention.attention.key.", "attn.k."),
    ("attention.attention.value.", "attn.v."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
)
"""Names within a block of the files on Hugging Face's hub."""


def _no_facts(config: Mapping[str, Any]) -> Hints:
    return Hints()


@dataclass(frozen=True)
class Format:
    """One published format, in both directions."""

    name: str
    """As `inspect` shows it."""

    recognise: Callable[[Mapping[str, Tensor]], bool]
    """Whether a file is of this format, by its keys and the axes of its patch embedding."""

    modules: Table
    """Names outside blocks, and where blocks lie."""

    leaves: Table
    """Names within a block."""

    attention: AttentionForm
    """How attention is written."""

    positions: Positions
    """The table that its code adds, and the one assumed where a file holds none."""

    kinds: tuple[Kind, ...]
    """What it can hold."""

    image: bool = False
    """Images with a class token; clips without one otherwise."""

    stores_positions: bool = False
    """The position tables are part of the file."""

    key_bias: bool = False
    """Keys have a bias of their own (`separate` attention only)."""

    ignored: tuple[str, ...] = ()
    """Beginnings of names that are known and have no counterpart here."""

    facts: Callable[[Mapping[str, Any]], Hints] = _no_facts
    """What the `config.json` beside the weights tells."""

    config: Callable[[Checkpoint], dict[str, Any]] | None = None
    """The `config.json` to write beside the weights."""


def patch_axes(tensors: Mapping[str, Tensor], *names: str) -> int:
    """Axes of the first patch embedding found: 5 for tubelets, 4 for images, 2 for ours, 0 without one."""
    return next((tensors[name].ndim for name in names if name in tensors), 0)


def whole(config: Mapping[str, Any], key: str) -> int | None:
    """A whole number of a foreign `config.json`, or None."""
    value = config.get(key)
    return value if type(value) is int else None
