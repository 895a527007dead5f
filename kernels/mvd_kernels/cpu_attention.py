"""Attention of bfloat16 on a CPU, whose forward and backward passes each go the way that they are told.

Every forward pass leaves what every backward pass needs: the packed input, the output, and the logarithm of the sum of
exponentials of each query.

Legend: B clips, N tokens, Q queries (the last Q tokens), H heads, C channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvd_kernels.native import attention as native

AttentionWay = Literal["native", "sdpa", "sdpa in float32"]
"""`native`: the C++ of this package. `sdpa`: torch's kernel on bfloat16. `sdpa in float32`: the same on float32."""

_TOKENS = 1600
"""Tokens that torch's kernel attends to at a time: copies in float32 of more would leave the cache."""


@dataclass(frozen=True)
class AttentionWays:
    """Way of each pass of attention."""

    forward: AttentionWay
    backward: AttentionWay

    def __str__(self) -> str:
        same = self.forward == self.backward
        return self.forward if same else f"forward {self.forward}, backward {self.backward}"


def possible_ways(channels: int) -> list[AttentionWay]:
    """List the ways that this CPU can go with heads of C channels."""
    return [way for way in get_args(AttentionWay) if way != "native" or native.can_compute(channels)]


def cpu_attention(qkv: Tensor, queries: int, ways: AttentionWays) -> Tensor:
    """Compute softmax(q k^T / sqrt(C)) v.

    Args:
        qkv: bfloat16 (B, N, 3, H, C) on the CPU.
        queries: compute the output for the last Q tokens only.
        ways: ways of both passes; `native` is `sdpa` where it is not one of `possible_ways`.

    Returns:
        bfloat16 (B, Q, H, C). Softmax and sums are in float32.
    """
    # A model may have heads of another size than those of the trial, and a host of the job another CPU.
    if "native" in (ways.forward, ways.backward) and not native.can_compute(qkv.shape[-1]):
        forward, backward = ("sdpa" if way == "native" else way for way in (ways.forward, ways.backward))
        ways = AttentionWays(forward, backward)
    attended: Tensor = _Attention.apply(qkv, queries, ways)
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, queries: int, ways: AttentionWays) -> Tensor:
        qkv, queries = qkv.contiguous(), min(queries, qkv.shape[1])
        if ways.forward == "native":
            attended, sums = native.forward(qkv, queries)
        else:
            attended, sums = _forward_by_torch(qkv, queries, _dtype(ways.forward))
        ctx.save_for_backward(qkv, attended, sums)
        ctx.way = ways.backward
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.way == "native":
            return native.backward(gradient, *ctx.saved_tensors), None, None
        qkv, attended, sums = ctx.saved_tensors
        return _backward_by_torch(gradient, qkv, attended, sums, _dtype(ctx.way)), None, None


def _dtype(way: AttentionWay) -> torch.dtype:
    return torch.float32 if way == "sdpa in float32" else torch.bfloat16


def _forward_by_torch(qkv: Tensor, queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the output (B, Q, H, C) and, as `native.forward`, logarithms to base 2, float32 (B, H, Q)."""
    clips, _, _, heads, channels = qkv.shape
    attended = qkv.new_empty(clips, queries, heads, channels)
    sums = qkv.new_empty(clips, heads, queries, dtype=torch.float32)
    if attended.numel():
        size = _clips_together(qkv)
        for part, out, logarithms in zip(qkv.split(size), attended.split(size), sums.split(size), strict=True):
            made, natural = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads(part, queries, dtype))
            out.copy_(made.transpose(1, 2))
            torch.mul(natural, 1 / math.log(2), out=logarithms)
    return attended, sums


def _backward_by_torch(gradient: Tensor, qkv: Tensor, attended: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the gradient (B, N, 3, H, C) of `qkv`."""
    queries, result = attended.shape[1], torch.zeros_like(qkv)
    if not attended.numel():
        return result
    size = _clips_together(qkv)
    tensors = (gradient, qkv, attended, sums, result)
    for up, part, out, logarithms, to in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        upward, output = (tensor.transpose(1, 2).to(dtype) for tensor in (up, out))
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upward, *_heads(part, queries, dtype), output, logarithms * math.log(2), 0.0, False
        )
        to_query, to_key, to_value = (made.transpose(1, 2) for made in gradients)
        to[:, -queries:, 0].copy_(to_query)
        to[:, :, 1].copy_(to_key)
        to[:, :, 2].copy_(to_value)
    return result


def _clips_together(qkv: Tensor) -> int:
    return max(_TOKENS // qkv.shape[1], 1)


def _heads(qkv: Tensor, queries: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Split packed qkv into the last Q queries (B, H, Q, C), all keys and all values (B, H, N, C)."""
    query, key, value = qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return query[:, :, -queries:], key, value
