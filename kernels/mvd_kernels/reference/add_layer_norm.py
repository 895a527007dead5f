"""`add_layer_norm` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_layer_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `mvd_kernels.add_layer_norm`."""
    total = residual + update
    if weight.dim() == 1:
        return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    norms = zip(total.chunk(len(weight)), weight, bias, strict=True)
    return total, torch.cat([F.layer_norm(part, w.shape, w, b, eps) for part, w, b in norms])
