"""`attention` in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(qkv: Tensor) -> Tensor:
    """See `mvd_kernels.attention`."""
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
