"""Rotary positions of V-JEPA 2 and 2.1: queries and keys are turned by their time slice, row and column.

A head's channels are split into three equal sections, one for each axis of the token grid; the few that are left over
are not turned. Within a section, channels 2 i and 2 i + 1 are turned together.

Legend: B clips, N tokens, H heads, C channels of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mvd_scale.config.model import Positions

_BASE = 10000.0

_SPAN = 15
"""Row and column of the last patch at V-JEPA 2.1's first input size, 256 pixels in patches of 16: it scales rows and
columns of every other grid to this range."""


def rotation_table(kind: Positions, grid: tuple[int, int, int], channels: int) -> Tensor:
    """Compute the cosines and sines of the angles by which each channel is turned at each token.

    Args:
        kind: `rotary_vjepa2` or `rotary_vjepa2_1`.
        grid: tokens along time, height and width.
        channels: C.

    Returns:
        float32 (2, N, C), tokens in time-major order; cosine 1 and sine 0 for channels that are not turned.
    """
    section = channels // 3 // 2 * 2
    axes = [torch.arange(count, dtype=torch.float64) for count in grid]
    if kind == "rotary_vjepa2_1":
        axes[1:] = [places * (_SPAN / max(len(places) - 1, 1)) for places in axes[1:]]
    rates = _BASE ** -(torch.arange(section // 2, dtype=torch.float64) / (section / 2))
    # V-JEPA 2 was trained with the frequencies repeated as a whole, so that the channels of a pair have different
    # ones and the map is no rotation; V-JEPA 2.1 gives both channels of a pair the same.
    rates = rates.repeat(2) if kind == "rotary_vjepa2" else rates.repeat_interleave(2)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    angles = places.new_zeros(len(places), channels)
    angles[:, : 3 * section] = (places.unsqueeze(-1) * rates).flatten(1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Turn queries and keys by their positions.

    Args:
        qkv: packed queries, keys and values (B, N, 3, H, C).
        rotation: (2, N, C), see `rotation_table`.

    Returns:
        (B, N, 3, H, C) in the dtype of `qkv`; the values are those of `qkv`.
    """
    cosines, sines = rotation[:, :, None, None]
    turned, values = qkv.split([2, 1], dim=2)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([(turned * cosines + crossed * sines).to(qkv.dtype), values], dim=2)
