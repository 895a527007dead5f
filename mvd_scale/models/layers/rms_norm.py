"""Norms by the root mean square, without mean and bias, as InternVideo2's blocks have them.

Legend: D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis, with eps 1e-6 and a weight for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (..., D); same dtype out."""
        return F.rms_norm(input, self.weight.shape, self.weight, eps=1e-6)


class AddRMSNorm(RMSNorm):
    """Residual connection and the norm after it."""

    def forward(self, residual: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return `residual + update` and its norm, both (..., D)."""
        total = residual + update
        return total, super().forward(total)
