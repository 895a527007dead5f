"""Benchmark of `attention`: flash-attn or C++ if available, and torch's own; encoder and decoder of ViT-B and ViT-L."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mvd_kernels.attention import FLASH_ATTENTION_RELEASES, attention_backends
from mvd_kernels.bench.case import BenchmarkCase, clips, leaf
from mvd_kernels.cpu_attention import AttentionWays, cpu_attention, possible_ways
from mvd_kernels.reference.attention import attention


def cases(device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield cases of 160 visible tokens (encoder) and of all 1568 tokens (decoder and teachers)."""
    count, dtype = clips(device), torch.bfloat16
    for model, heads in (("B", 12), ("L", 16)):
        for tokens in (160, 1568):
            qkv = leaf(count, tokens, 3, heads, 64, device=device, dtype=dtype)
            shape = f"{model}: B {count}, N {tokens}, H {heads}, K 64"
            flops = 4 * count * heads * tokens**2 * 64
            yield BenchmarkCase(shape, dtype, attention_implementations(qkv, tokens), (qkv,), flops=flops)


def attention_implementations(qkv: Tensor, queries: int) -> dict[str, Callable[[], Tensor]]:
    """Make the calls of attention by every implementation that its device has; {implementation: call}.

    Args:
        qkv: (B, N, 3, H, K), any floating dtype.
        queries: number Q of last tokens whose output is computed.
    """
    device, dtype, channels = qkv.device, qkv.dtype, qkv.shape[-1]
    calls: dict[str, Callable[[], Tensor]] = {"sdpa": partial(attention, qkv, queries)}
    refused = attention_backends(device, dtype, channels)
    for backend in FLASH_ATTENTION_RELEASES:
        if refused.get(backend.name) == "":
            calls[backend.name] = partial(backend.attend, qkv, None if queries == qkv.shape[1] else queries)
    if device.type == "cpu" and dtype == torch.bfloat16:
        for way in possible_ways(channels):
            calls[way] = partial(cpu_attention, qkv, queries, AttentionWays(way, way))
    return calls
