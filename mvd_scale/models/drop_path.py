"""Stochastic depth that torch.compile compiles once for all rates."""

from __future__ import annotations

import timm.layers
import torch
from torch import Tensor


class DropPath(timm.layers.DropPath):
    """timm's `DropPath`, except that a compiled program reads the rate from a tensor, so that blocks of different rates
    share one program.

    Args:
        rate: share of the clips whose update is dropped in training, in [0, 1); the other updates are divided by
            1 - rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        # Not a buffer: `Module.to(dtype)` would round it to the dtype of the weights.
        self.keep = torch.tensor(1 - rate, dtype=torch.float32, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """Drop the updates of some clips: (B, N, D) to (B, N, D) in the same dtype."""
        # A compiled program draws other clips than timm would: it has its own random generator in any case.
        if not self.training or not torch.compiler.is_compiling():
            return super().forward(x)
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)
