"""Joint space-time self-attention over packed queries, keys and values.

Legend: B clips, N tokens, H heads, K channels of a head.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mvd_kernels import chunked_attention


@cache
def _flash_attn_works(device: torch.device) -> bool:
    """Whether flash-attn can be imported (it breaks with another torch) and knows the GPU (Ampere and newer)."""
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation `attention` takes for long clips of a device and dtype: `flash-attn` or `sdpa`."""
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return "flash-attn" if fits and _flash_attn_works(device) else "sdpa"


def attention(qkv: Tensor, queries: int | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v over all tokens of a clip, without mask and dropout.

    Args:
        qkv: (B, N, 3, H, K), any floating dtype.
        queries: only the last so many tokens ask (Q); all of them if None.

    Returns:
        (B, Q, H * K), same dtype.
    """
    if attention_backend(qkv.device, qkv.dtype) == "flash-attn":
        from flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func

        if queries is None:
            attended: Tensor = flash_attn_qkvpacked_func(qkv)
        else:
            attended = flash_attn_kvpacked_func(qkv[:, -queries:, 0], qkv[:, :, 1:])
        return attended.flatten(2)
    if chunked_attention.pays(qkv):
        return chunked_attention.chunked_attention(qkv, queries or qkv.shape[1]).flatten(2)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if queries is not None:
        query = query[:, :, -queries:]
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
