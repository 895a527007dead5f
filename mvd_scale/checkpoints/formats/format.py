"""`Format`: the names of a published format, the form of its attention and the positions that its code adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Checkpoint, Hints, Kind
from mvd_scale.checkpoints.formats.names import AttentionForm, Table
from mvd_scale.config.model import Positions, is_rotary
from mvd_scale.models.encoder import IMAGENET_MEAN, IMAGENET_STD

SPLIT_LEAVES: Table = (("attn.q_bias", "attn.qkv.q_bias"), ("attn.v_bias", "attn.qkv.v_bias"), ("", ""))
"""Names within a block, for VideoMAE and MVD."""

FUSED_LEAVES: Table = (("", ""),)
"""Names within a block, for MAE and timm."""

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
"""Names within a block, for the files on Hugging Face's hub."""


def _unchanged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


def _no_facts(config: Mapping[str, Any]) -> Hints:
    return Hints()


@dataclass(frozen=True)
class Format:
    """One published format, in both directions."""

    name: str
    """Name that `mvd-scale inspect` shows."""

    recognise: Callable[[Mapping[str, Tensor]], bool]
    """Predicate: whether a file is of this format, judged by its keys and the axes of its patch embedding."""

    modules: Table
    """Names outside blocks, and the prefix of the blocks."""

    leaves: Table
    """Names within a block."""

    attention: AttentionForm
    """Form of the attention's weights and biases."""

    positions: Positions
    """Position table that the format's code adds; assumed if a file contains none."""

    kinds: tuple[Kind, ...]
    """Kinds of model that the format can represent."""

    image: bool = False
    """True: models of images with a class token; False: models of clips without one."""

    stores_positions: bool = False
    """Whether files contain the position tables."""

    key_bias: bool = False
    """Whether the keys have a bias (`separate` attention only)."""

    heads: Mapping[int, int] = field(default_factory=dict)
    """Attention heads by width, for sizes that are not in `SIZES` or have another number of heads there."""

    frames: int = 16
    """Frames per clip of the published models; used if neither the file nor the hints state them."""

    input_size: int | None = None
    """Input side in pixels of the published models, for files that contain no positions; None for 14 patches."""

    prepare: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _unchanged
    """Function that merges tensors of a file that always act together, before they are renamed."""

    ignored: tuple[str, ...] = ()
    """Prefixes of names that are known and deliberately not loaded."""

    facts: Callable[[Mapping[str, Any]], Hints] = _no_facts
    """Function that reads hints from the `config.json` beside the weights."""

    config: Callable[[Checkpoint], dict[str, Any]] | None = None
    """Function that makes the `config.json` to write beside the weights; None if the format has none."""

    processor: Callable[[Checkpoint], dict[str, Any]] | None = None
    """Function that makes the `preprocessor_config.json` to write beside the weights; None if the format has none."""

    @property
    def is_rotary(self) -> bool:
        """Whether the positions turn queries and keys, so that a bias of the keys counts."""
        return is_rotary(self.positions)


def patch_axes(tensors: Mapping[str, Tensor], *names: str) -> int:
    """Number of axes of the first patch embedding found: 5 tubelets, 4 images, 2 this project, 0 none found."""
    return next((tensors[name].ndim for name in names if name in tensors), 0)


def int_or_none(config: Mapping[str, Any], key: str) -> int | None:
    """Read an integer from the `config.json` of another library; None if it is absent or no integer."""
    value = config.get(key)
    return value if type(value) is int else None


def processor_config(kind: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings of an image processor of Hugging Face: centre crop of frames, normalised by ImageNet's moments."""
    side = checkpoint.model.input_size
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def unnamed_classes(classes: int) -> tuple[str, ...]:
    """Names that Hugging Face gives to classes without names."""
    return tuple(f"LABEL_{label}" for label in range(classes))
