"""Fixed position tables of the published models: float32 (N, D), tokens in time-major order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mvd_scale.config.model import ModelConfig, Positions
from mvd_scale.models.layers.rotary import rotation_table


def encoder_positions(model: ModelConfig) -> Tensor:
    """Compute the fixed positions of an encoder: the table (N, D) that is added, or the rotation (2, N, C); float32."""
    if model.is_rotary:
        return rotation_table(model.positions, model.grid, model.head_width)
    assert model.width is not None
    return position_table(model.positions, model.grid, model.width)


def position_table(kind: Positions, grid: tuple[int, int, int], width: int) -> Tensor:
    """Compute the fixed position table of a token grid.

    Args:
        kind: `sincos3d` (MVD), `sinusoid` (VideoMAE) or `sincos2d` (MAE).
        grid: tokens along time, height and width.
        width: D.

    Returns:
        float32 (N, D).

    Raises:
        ValueError: the width is not a multiple of 16 (sincos3d) or of 4 (sincos2d).
    """
    time, height, columns = grid
    if kind == "sinusoid":
        return _sinusoid(time * height * columns, width)
    if kind == "sincos2d":
        return _sincos_2d(height, columns, width).float()
    if width % 16:
        raise ValueError(f"positions sincos3d need a width that is a multiple of 16, got {width}")
    temporal = _sincos_1d(torch.arange(time), width // 4)
    spatial = _sincos_2d(height, columns, width // 4 * 3)
    return torch.cat([temporal.repeat_interleave(height * columns, dim=0), spatial.repeat(time, 1)], dim=1).float()


def resize_positions(table: Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> Tensor:
    """Interpolate a position table to another grid, bicubic in space, linear in time: float32 (N, D) to (N', D).

    Space and time are separable; an axis whose size does not change is not interpolated, so its values stay exact.
    """
    cells = table.float().unflatten(0, old)
    if old[1:] != new[1:]:
        slices = cells.permute(0, 3, 1, 2)
        slices = F.interpolate(slices, size=new[1:], mode="bicubic", antialias=True, align_corners=False)
        cells = slices.permute(0, 2, 3, 1)
    if old[0] != new[0]:
        lines = cells.flatten(1).t().unsqueeze(0)
        lines = F.interpolate(lines, size=new[0], mode="linear", align_corners=False)
        cells = lines.squeeze(0).t().unflatten(1, (*new[1:], -1))
    return torch.flatten(cells, 0, 2)


def _sincos_1d(positions: Tensor, width: int) -> Tensor:
    rates = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.flatten().double().outer(rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _sincos_2d(height: int, columns: int, width: int) -> Tensor:
    if width % 4:
        raise ValueError(f"positions sincos2d need a width that is a multiple of 4, got {width}")
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(columns), indexing="ij")
    # The published table has the column's channels first.
    return torch.cat([_sincos_1d(cols, width // 2), _sincos_1d(rows, width // 2)], dim=1)


def _sinusoid(tokens: int, width: int) -> Tensor:
    channel = torch.arange(width, dtype=torch.float64)
    rates = 10000.0 ** -(2 * channel.div(2, rounding_mode="floor") / width)
    angles = torch.arange(tokens, dtype=torch.float64).outer(rates)
    table = angles.clone()
    table[:, 0::2] = angles[:, 0::2].sin()
    table[:, 1::2] = angles[:, 1::2].cos()
    return table.float()
