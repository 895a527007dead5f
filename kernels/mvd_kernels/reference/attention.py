"""`attention` in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(qkv: Tensor, queries: int | None = None) -> Tensor:
    """See `mvd_kernels.attention`."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if queries is not None:
        query = query[:, :, -queries:]
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
