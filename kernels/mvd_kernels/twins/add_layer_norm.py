"""`add_layer_norm` in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def add_layer_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `mvd_kernels.add_layer_norm`."""
    total = residual + update
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)
