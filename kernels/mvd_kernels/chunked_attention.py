"""Attention for CPUs with bf16 instructions, where the matrix products of torch's own kernel stay in float32.

Scores are computed for some hundred queries of one head at a time: they stay in the cache, and the backward pass makes
them again.

Legend: B clips, N tokens, Q queries, H heads, K channels of a head.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

CHUNK = 784
"""Queries at a time: half of the 1568 tokens of a clip of 16x224x224."""

SHORTEST = 512
"""Tokens from which on it pays; below it torch's own kernel is faster."""


@cache
def bf16_instructions() -> bool:
    """Whether this CPU multiplies matrices of bfloat16."""
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def pays(qkv: Tensor) -> bool:
    """Whether this is the fastest way here for packed queries, keys and values (B, N, 3, H, K)."""
    return (
        qkv.device.type == "cpu"
        and qkv.dtype == torch.bfloat16
        and qkv.shape[1] >= SHORTEST
        # Before the CPU is asked, which a compiled program cannot do.
        and not torch.compiler.is_compiling()
        and bf16_instructions()
    )


def chunked_attention(qkv: Tensor, queries: int) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v.

    Args:
        qkv: (B, N, 3, H, K), any floating dtype.
        queries: the last so many tokens ask (Q).

    Returns:
        (B, Q, H, K), same dtype. The softmax is computed in float32 from scores of that dtype.
    """
    attended: Tensor = _ChunkedAttention.apply(qkv, queries)
    return attended


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, queries: int) -> Tensor:
        clips, tokens, _, heads, channels = qkv.shape
        # One head after the other, (3, B H, N, K).
        query, key, value = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous().unbind(0)
        query = query[:, tokens - queries :] * channels**-0.5
        attended = qkv.new_empty(clips, queries, heads, channels)
        scores = qkv.new_empty(min(CHUNK, queries), tokens)
        shares = torch.empty_like(scores)
        for head, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
            clip, place = divmod(head, heads)
            for start in range(0, queries, CHUNK):
                chunk = slice(start, min(start + CHUNK, queries))
                share = _softmax(q[chunk], k, scores, shares)
                attended[clip, chunk, place] = share @ v
        ctx.save_for_backward(query, key, value, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        query, key, value, attended = ctx.saved_tensors
        clips, queries, heads, channels = attended.shape
        tokens = key.shape[1]
        # What every score of a query loses to the sum of its shares being 1.
        losses = (gradient.float() * attended.float()).sum(-1).permute(0, 2, 1).flatten(0, 1).unsqueeze(-1)
        gradients = gradient.permute(0, 2, 1, 3).flatten(0, 1).contiguous()
        result = gradient.new_zeros(3, clips * heads, tokens, channels)
        scores = gradient.new_empty(min(CHUNK, queries), tokens)
        shares, slopes = torch.empty_like(scores), torch.empty_like(scores)
        for head, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
            to_key = torch.zeros(tokens, channels)
            to_value = torch.zeros(tokens, channels)
            for start in range(0, queries, CHUNK):
                chunk = slice(start, min(start + CHUNK, queries))
                share, arrived = _softmax(q[chunk], k, scores, shares), gradients[head, chunk]
                to_value += share.t() @ arrived
                slope = torch.mm(arrived, v.t(), out=slopes[: len(arrived)])
                slope.sub_(losses[head, chunk]).mul_(share)
                result[0, head, tokens - queries :][chunk] = slope @ k
                to_key += slope.t() @ q[chunk]
            result[1, head], result[2, head] = to_key, to_value
        result[0] *= channels**-0.5
        return result.unflatten(1, (clips, heads)).permute(1, 3, 0, 2, 4), None


def _softmax(query: Tensor, key: Tensor, scores: Tensor, shares: Tensor) -> Tensor:
    """Shares of the keys for some queries, written into `shares`; `scores` is scratch."""
    score = torch.mm(query, key.t(), out=scores[: len(query)])
    return torch.softmax(score, dim=-1, out=shares[: len(query)])
