"""Attention for CPUs with AVX512-BF16 but without AMX, on which torch's own kernel multiplies in float32.

Legend: B clips, N tokens, Q queries, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mvd_kernels.native.library import build_error, call, library

CHANNELS = (32, 64, 80, 96, 128)
"""Numbers of channels per head for which the kernel is compiled."""


def instructions() -> Mapping[str, Any]:
    """Instruction sets of this CPU by name, among them `avx512_bf16` and `amx_bf16`."""
    if hasattr(torch.cpu, "get_capabilities"):
        abilities: Mapping[str, Any] = torch.cpu.get_capabilities()
        return abilities
    # torch before 2.11; every CPU with AMX has its products of bfloat16.
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}


@cache
def bf16_instructions() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX512-BF16 or AMX-BF16)."""
    abilities = instructions()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def unsupported_reason(device: torch.device, dtype: torch.dtype, channels: int) -> str:
    """Reason why this kernel cannot be used for heads of C channels; empty if it can."""
    if device.type != "cpu":
        return "needs a CPU"
    if dtype != torch.bfloat16:
        return f"not for {dtype}"
    if channels not in CHANNELS:
        return f"not for heads of {channels} channels"
    return refusal_of_instructions() or _refusal_of_build()


@cache
def can_compute(channels: int) -> bool:
    """Whether this CPU can run the kernel for heads of C channels, even if torch's own may be faster."""
    return channels in CHANNELS and bool(instructions().get("avx512_bf16")) and not _refusal_of_build()


def refusal_of_instructions() -> str:
    """Reason why this kernel is not used on this CPU; empty if it is."""
    abilities = instructions()
    if not abilities.get("avx512_bf16"):
        return "needs a CPU with AVX512-BF16"
    return "torch's own kernel uses the AMX of this CPU" if abilities.get("amx_bf16") else ""


@cache
def _refusal_of_build() -> str:
    if refused := build_error():
        return refused
    return "" if hasattr(library(), "mvd_attention_forward") else "c++ does not know AVX512-BF16"


def forward(qkv: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Compute softmax(q k^T / sqrt(C)) v.

    Args:
        qkv: contiguous bfloat16 (B, N, 3, H, C).
        queries: compute the output for the last Q tokens only, at most N.

    Returns:
        bfloat16 (B, Q, H, C), and the logarithms to base 2 of the sums of exponentials, float32 (B, H, Q).
    """
    clips, tokens, _, heads, channels = qkv.shape
    attended = qkv.new_empty(clips, queries, heads, channels)
    sums = qkv.new_empty(clips, heads, queries, dtype=torch.float32)
    if attended.numel():
        call("mvd_attention_forward", (qkv, attended, sums), clips, tokens, queries, heads, channels)
    return attended, sums


def backward(gradient: Tensor, qkv: Tensor, attended: Tensor, sums: Tensor) -> Tensor:
    """Compute the gradient of `qkv`, bfloat16 (B, N, 3, H, C), from that of the output and the results of `forward`."""
    clips, tokens, _, heads, channels = qkv.shape
    tensors = (qkv, attended, gradient.contiguous(), sums, result := torch.zeros_like(qkv))
    if attended.numel():
        call("mvd_attention_backward", tensors, clips, tokens, attended.shape[1], heads, channels)
    return result
