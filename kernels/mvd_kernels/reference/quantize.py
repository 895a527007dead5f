"""`quantize` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_STEP = 1e-30
"""Least step between two levels; avoids a division by zero for activations that are all close to zero."""


def quantize(sequences: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `mvd_kernels.quantize`."""
    numbers = sequences.float().flatten(1)
    low, high = numbers.amin(1).clamp_max(0), numbers.amax(1).clamp_min(0)
    steps = ((high - low) / levels).clamp_min(_LEAST_STEP)
    steps = torch.where(numbers.isfinite().all(1), steps, torch.nan)
    zeros = (-low / steps).round().nan_to_num()
    placed = (numbers / steps.unsqueeze(1)).round() + zeros.unsqueeze(1)
    return placed.clamp(0, levels).nan_to_num().to(torch.uint8).view(sequences.shape), steps, zeros.int()
