"""LayerNorm over the last axis: apex's fused kernel on GPUs if it is installed and the block is not compiled."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from mvd_kernels.add_layer_norm import add_layer_norm


@cache
def _apex_installed() -> bool:
    return find_spec("apex") is not None and find_spec("fused_layer_norm_cuda") is not None


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over one axis with eps 1e-6, the value of every published model."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (..., D); statistics in float32, same dtype out."""
        # torch.compile fuses its own norm with what surrounds it, and cannot look into apex's.
        if input.is_cuda and not torch.compiler.is_compiling() and _apex_installed():
            from apex.normalization.fused_layer_norm import fused_layer_norm_affine

            fused: Tensor = fused_layer_norm_affine(input, self.weight, self.bias, self.normalized_shape, self.eps)
            return fused
        return super().forward(input)


class AddLayerNorm(LayerNorm):
    """Residual connection and the LayerNorm after it, in one pass."""

    def forward(self, residual: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return `residual + update` and its LayerNorm, both (..., D)."""
        return add_layer_norm(residual, update, self.weight, self.bias, self.eps)
