"""Joint space-time self-attention over packed queries, keys and values.

Legend: B clips, N tokens, H heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from mvd_kernels.cpu_attention import AttentionWays, cpu_attention
from mvd_kernels.flash_attention_4 import flash_attention_4
from mvd_kernels.native import attention as native
from mvd_kernels.reference.attention import attention as reference


# The functions import with plain statements, which torch.compile can trace; no machine needs all three packages.
def _flash_attn_4(qkv: Tensor, queries: int | None = None) -> Tensor:
    return flash_attention_4(*_parts(qkv, queries))


def _flash_attn_3(qkv: Tensor, queries: int | None = None) -> Tensor:
    if queries is None:
        from flash_attn_interface import flash_attn_qkvpacked_func

        return _first(flash_attn_qkvpacked_func(qkv))
    from flash_attn_interface import flash_attn_func

    return _first(flash_attn_func(*_parts(qkv, queries)))


def _flash_attn_2(qkv: Tensor, queries: int | None = None) -> Tensor:
    if queries is None:
        from flash_attn import flash_attn_qkvpacked_func

        return _first(flash_attn_qkvpacked_func(qkv))
    from flash_attn import flash_attn_func

    return _first(flash_attn_func(*_parts(qkv, queries)))


def _parts(qkv: Tensor, queries: int | None) -> tuple[Tensor, ...]:
    """Split packed qkv into the last `queries` queries (all if None), all keys and all values."""
    query, key, value = qkv.unbind(2)
    return query if queries is None else query[:, -queries:], key, value


def _first(attended: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Drop the softmax sums that the first builds of release 3 return beside the output."""
    return attended[0] if isinstance(attended, tuple) else attended


@dataclass(frozen=True)
class FlashAttentionRelease:
    """A release of flash-attn, and the devices and shapes that it supports.

    Attributes:
        name: name that `attention_backend` returns.
        module: module that contains its functions.
        function: name of one of them; a module without it belongs to another release.
        attend: attention from qkv (B, N, 3, H, K) and the number Q of last tokens whose queries count, to (B, Q, H, K).
        majors: supported major compute capabilities.
        channels: largest supported number of channels per head.
    """

    name: str
    module: str
    function: str
    attend: Callable[..., Tensor]
    majors: tuple[int, ...]
    channels: int


# Newest first. All need float16 or bfloat16, and a multiple of 8 channels per head.
FLASH_ATTENTION_RELEASES = (
    FlashAttentionRelease(
        "flash-attn-4", "flash_attn.cute.interface", "_flash_attn_bwd", _flash_attn_4, (9, 10, 11), 128
    ),
    FlashAttentionRelease(
        "flash-attn-3", "flash_attn_interface", "flash_attn_qkvpacked_func", _flash_attn_3, (9,), 256
    ),
    FlashAttentionRelease(
        "flash-attn-2", "flash_attn", "flash_attn_qkvpacked_func", _flash_attn_2, (8, 9, 10, 11, 12), 256
    ),
)


_NATIVE = AttentionWays("native", "native")


@cache
def _refusal(backend: FlashAttentionRelease, major: int) -> str | None:
    """Reason why a backend cannot run on GPUs of this major compute capability; None if it can."""
    if major not in backend.majors:
        return f"not for compute capability {major}.x"
    try:
        getattr(import_module(backend.module), backend.function)
    # A package that was built for another torch, driver or compiler may raise any exception while it loads.
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def attention_backends(device: torch.device, dtype: torch.dtype, channels: int = 64) -> dict[str, str]:
    """List implementations in order of preference with the reason why each is not used; the last one is used.

    Args:
        device: device of the tensors.
        dtype: dtype of the tensors.
        channels: channels per head, K.

    Returns:
        {name: reason}; the reason of the implementation that is used is empty.
    """
    if device.type != "cuda":
        refused = native.unsupported_reason(device, dtype, channels)
        return {"native": refused, "sdpa": ""} if refused else {"native": ""}
    reasons = {}
    for backend in FLASH_ATTENTION_RELEASES:
        reason: str | None
        if dtype not in (torch.float16, torch.bfloat16):
            reason = f"not for {dtype}"
        elif channels % 8 or channels > backend.channels:
            reason = f"not for heads of {channels} channels"
        else:
            reason = _refusal(backend, torch.cuda.get_device_capability(device)[0])
        reasons[backend.name] = reason or ""
        if reason is None:
            return reasons
    return {**reasons, "sdpa": ""}


def attention_backend(device: torch.device, dtype: torch.dtype, channels: int = 64) -> str:
    """Name of the implementation that `attention` uses: `flash-attn-4`, `-3` or `-2` on GPUs, `native` on CPUs with
    AVX512-BF16 but without AMX, otherwise `sdpa` (torch's own).

    The arguments are those of `attention_backends`, which gives the reasons against the preferred ones.
    """
    name: str = _choice(device, dtype, channels)
    return name


# A constant for torch.compile: the installed packages do not change while a compiled program runs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choice(device: torch.device, dtype: torch.dtype, channels: int) -> str:
    return list(attention_backends(device, dtype, channels))[-1]


def attention(qkv: Tensor, queries: int | None = None, ways: AttentionWays | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v over all tokens of a clip, without mask and dropout.

    Args:
        qkv: (B, N, 3, H, K), any floating dtype.
        queries: compute the output for the last Q tokens only; for all tokens (Q = N) if None.
        ways: ways of the passes over bfloat16 on a CPU, which alone reads them; None for `attention_backend`.

    Returns:
        (B, Q, H * K), same dtype.
    """
    if ways is not None and qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        return cpu_attention(qkv, queries or qkv.shape[1], ways).flatten(2)
    name = attention_backend(qkv.device, qkv.dtype, qkv.shape[-1])
    for backend in FLASH_ATTENTION_RELEASES:
        if backend.name == name:
            return backend.attend(qkv, queries).flatten(2)
    # torch.compile cannot trace the C++ function; torch's own attention can be traced.
    if name == "native" and not torch.compiler.is_compiling():
        return cpu_attention(qkv, queries or qkv.shape[1], _NATIVE).flatten(2)
    return reference(qkv, queries)
