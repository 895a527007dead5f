"""Tokens that all clips of a batch have in common, computed once and then copied to the clips that have them.

Mask tokens enter a decoder equal in all clips but for their positions. What is computed from one such token alone, the
first norm and its query, key and value, is therefore computed for each position once, not for each clip.

Legend: B clips, S tokens of a clip's own, N positions of the grid, M masked, D width, G decoders.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class MaskPlaces(NamedTuple):
    """Places of mask tokens in the clips of a batch, for rows (G, B S + N, D): see `spread_rows`."""

    masked: Tensor
    """int64 (B, M), positions of the masked tokens of each clip, none of them twice."""

    positions: int
    """Number of positions, N."""

    def saves(self) -> bool:
        """Whether the clips have more mask tokens than there are positions; known from the shapes alone."""
        return self.masked.numel() > self.positions


def spread_rows(rows: Tensor, places: MaskPlaces) -> Tensor:
    """Copy rows to the clips that have them: the gradient of a shared row is the sum over those clips.

    The sum is in float32 and in the order of the clips, so the same input gives the same bits.

    Args:
        rows: (G, B S + N, D): the S own tokens of each clip in turn, then one row for each position.
        places: the masked tokens of each clip.

    Returns:
        (G B, S + M, D): the own tokens of a clip, then its masked ones.
    """
    spread: Tensor = _Spread.apply(rows, *places)
    return spread


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, masked: Tensor, positions: int) -> Tensor:
        ctx.save_for_backward(masked)
        ctx.own, ctx.positions = rows.shape[1] - positions, positions
        index = torch.cat([_own_rows(ctx.own, masked), ctx.own + masked], dim=1)
        return rows.index_select(1, index.flatten()).view(-1, index.shape[1], rows.shape[2])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (masked,) = ctx.saved_tensors
        clips, own, positions = len(masked), ctx.own, ctx.positions
        # Rows of which each has one clip's gradient: a clip's own, and for every clip all positions.
        first = own + positions * torch.arange(clips, device=masked.device).unsqueeze(1)
        index = torch.cat([_own_rows(own, masked), first + masked], dim=1)
        apart = upstream.new_zeros(len(upstream) // clips, own + clips * positions, upstream.shape[2])
        apart.index_copy_(1, index.flatten(), upstream.reshape(len(apart), -1, upstream.shape[2]))
        shared = apart[:, own:].unflatten(1, (clips, positions)).sum(1, dtype=torch.float32)
        return torch.cat([apart[:, :own], shared.to(upstream.dtype)], dim=1), None, None


def _own_rows(own: int, masked: Tensor) -> Tensor:
    """Indices of the own rows of each clip: int64 (B, S)."""
    return torch.arange(own, device=masked.device).view(len(masked), -1)
