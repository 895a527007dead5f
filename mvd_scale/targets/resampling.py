"""Resampling of a teacher's features from its token grid to the student's.

Legend: B clips, N teacher's tokens, M student's tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_scale.errors import UserError

Grid = tuple[int, int, int]


class GridResampler:
    """Linear interpolation between token grids, axis by axis: features at the centres of the new grid's cells.

    Where an axis shrinks, the triangle of weights is as much wider, so that every old token counts (antialiasing).
    An axis whose size does not change is left as it is.
    """

    def __init__(self, old: Grid, new: Grid) -> None:
        self.old = old
        self.new = new
        self._weights: dict[tuple[int, torch.device], Tensor] = {}
        """Weights by axis and device, in float32: a teacher may be called in several precisions."""

    def __call__(self, features: Tensor) -> Tensor:
        """Resample features of all tokens, in time-major order: (B, N, D) to (B, M, D) in the same dtype."""
        clips, _, channels = features.shape
        sizes = [clips, *self.old, channels]
        for axis, (have, want) in enumerate(zip(self.old, self.new, strict=True), start=1):
            if have == want:
                continue
            key = (axis, features.device)
            if key not in self._weights:
                self._weights[key] = axis_weights(have, want, features.device)
            before, after = sizes[:axis], sizes[axis + 1 :]
            rows = features.reshape(torch.Size(before).numel(), have, torch.Size(after).numel())
            features, sizes = self._weights[key].to(features.dtype) @ rows, [*before, want, *after]
        return features.reshape(clips, -1, channels)


def axis_weights(old: int, new: int, device: torch.device | None = None) -> Tensor:
    """Weights of the old cells of one axis in each new cell: float32 (new, old), of sum 1 over the old cells."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64, device=device) + 0.5) * scale - 0.5
    distances = (centres.unsqueeze(1) - torch.arange(old, dtype=torch.float64, device=device)).abs()
    weights = (1 - distances / max(scale, 1.0)).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def make_resampler(name: str, old: Grid, new: Grid, *, allowed: bool, side: int) -> GridResampler | None:
    """Make the resampler of a teacher whose grid differs from the student's; None where they agree.

    Args:
        name: name of the target, for messages.
        old: token grid of the teacher.
        new: token grid of the student.
        allowed: whether the recipe says `resample: true`.
        side: input side in pixels at which the teacher would have the student's rows and columns.

    Raises:
        UserError: the grids differ, and the recipe does not allow resampling.
    """
    if old == new:
        return None
    if not allowed:
        have, want = ("x".join(map(str, grid)) for grid in (old, new))
        raise UserError(
            f"targets.{name}: the teacher's grid is {have} tokens, the student's {want}: resample its features with "
            f"`resample: true`"
            + (f", or give it frames of `input_size: {side}`" if old[1:] != new[1:] else ", or choose other `frames`")
        )
    return GridResampler(old, new)
