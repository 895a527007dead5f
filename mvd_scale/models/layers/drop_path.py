"""Stochastic depth that torch.compile compiles once for all rates, and that adds nothing to what is recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class _Scale(torch.autograd.Function):
    """Product with a constant that is no saved tensor to autograd.

    Gradient checkpointing recomputes a block up to the last tensor that was saved for the backward pass. A product
    after the MLP would save its constant there, so that the MLP's second layer would be computed again.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


class DropPath(nn.Module):
    """Stochastic depth with the draws of timm's `DropPath`.

    A compiled program reads the rate from a tensor, so that blocks of different rates share one program.

    It draws for each entry of the batch: for each clip of each decoder, where decoders run as one batch.

    Args:
        rate: share of the clips whose update is dropped in training, in [0, 1); the other updates are divided by
            1 - rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate
        # Not a buffer: `Module.to(dtype)` would round it to the dtype of the weights.
        self.keep = torch.tensor(1 - rate, dtype=torch.float32, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """Drop the updates of some clips: (B, N, D) to (B, N, D) in the same dtype."""
        # A compiled program draws other clips than timm would: it has its own random generator in any case.
        if not self.training:
            return x
        if torch.compiler.is_compiling():
            kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep
            return x * (kept / self.keep).to(x.dtype)
        keep = 1 - self.drop_prob
        scaled: Tensor = _Scale.apply(x, x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep))
        return scaled
