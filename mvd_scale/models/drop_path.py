"""Stochastic depth that torch.compile need not compile anew for every rate."""

from __future__ import annotations

import timm.layers
import torch
from torch import Tensor


class DropPath(timm.layers.DropPath):
    """timm's; in a compiled program the rate is data, so that blocks of all rates share one.

    Args:
        rate: share of the clips whose update is left out while training, from 0 to less than 1; the others grow.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        # Not a buffer, which would be rounded with the weights.
        self.keep = torch.tensor(1 - rate, dtype=torch.float32, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D), same dtype out."""
        # Other clips than timm would leave out: a compiled program has a generator of its own in any case.
        if not self.training or not torch.compiler.is_compiling():
            return super().forward(x)
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)
