"""Gather of tubes, which the references of the operators on tubes share."""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_kernels.tubes import token_grid


def gather_tubes(pixels: Tensor, tokens: Tensor | None, tubelet: int, patch: int) -> Tensor:
    """Gather the tubes of chosen tokens as (B, K, t, p, p, 3) in the dtype of `pixels`; other pixels are not read."""
    clips, channels = pixels.shape[0], pixels.shape[-1]
    time, rows, columns = token_grid(pixels, tubelet, patch)
    tubes = pixels.view(clips, time, tubelet, rows, patch, columns, patch, channels)
    if tokens is None:
        return tubes.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(clips, -1, tubelet, patch, patch, channels)
    clip = torch.arange(clips, device=pixels.device).unsqueeze(1)
    return tubes[
        clip,
        tokens.div(rows * columns, rounding_mode="floor"),
        :,
        tokens.div(columns, rounding_mode="floor") % rows,
        :,
        tokens % columns,
    ]
