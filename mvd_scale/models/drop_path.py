"""Stochastic depth whose rate is data, so that blocks of all rates are one program to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Leaves out the update of some clips while training; the others grow by as much, so that the mean stays.

    Args:
        rate: share of clips, from 0 to less than 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        # A number is compiled in; not a buffer, which would be rounded with the weights.
        self.keep = torch.tensor(1 - rate, dtype=torch.float32, device="cpu")

    def forward(self, update: Tensor) -> Tensor:
        """(B, N, D), same dtype out."""
        if not self.training:
            return update
        kept = torch.rand(len(update), 1, 1, device=update.device) < self.keep
        return update * (kept / self.keep).to(update.dtype)
