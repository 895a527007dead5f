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

from mvd_kernels.native import attention as native
from mvd_kernels.twins.attention import attention as twin


# Imports stand inside as statements: a program that is compiled can follow these, and no machine needs all three.
def _release_4(qkv: Tensor, queries: int | None = None) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return _first(flash_attn_func(*_parts(qkv, queries)))


def _release_3(qkv: Tensor, queries: int | None = None) -> Tensor:
    if queries is None:
        from flash_attn_interface import flash_attn_qkvpacked_func

        return _first(flash_attn_qkvpacked_func(qkv))
    from flash_attn_interface import flash_attn_func

    return _first(flash_attn_func(*_parts(qkv, queries)))


def _release_2(qkv: Tensor, queries: int | None = None) -> Tensor:
    if queries is None:
        from flash_attn import flash_attn_qkvpacked_func

        return _first(flash_attn_qkvpacked_func(qkv))
    from flash_attn import flash_attn_func

    return _first(flash_attn_func(*_parts(qkv, queries)))


def _parts(qkv: Tensor, queries: int | None) -> tuple[Tensor, ...]:
    """The last so many queries, or all; all keys and values."""
    query, key, value = qkv.unbind(2)
    return query if queries is None else query[:, -queries:], key, value


def _first(attended: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Release 4 and the first builds of 3 return the sums of the softmax too."""
    return attended[0] if isinstance(attended, tuple) else attended


@dataclass(frozen=True)
class Backend:
    """A release of flash-attn, and what it computes on.

    Attributes:
        name: as `attention_backend` gives it.
        module: where its function is.
        function: its name there. A module without it is another release.
        attend: (B, N, 3, H, K), and how many of the last tokens ask (Q), to (B, Q, H, K).
        majors: compute capabilities, by their first number.
        channels: most channels of a head.
    """

    name: str
    module: str
    function: str
    attend: Callable[..., Tensor]
    majors: tuple[int, ...]
    channels: int


# Newest first. All want float16 or bfloat16 and channels in eights.
BACKENDS = (
    Backend("flash-attn-4", "flash_attn.cute", "flash_attn_func", _release_4, (9, 10, 11), 128),
    Backend("flash-attn-3", "flash_attn_interface", "flash_attn_qkvpacked_func", _release_3, (9,), 256),
    Backend("flash-attn-2", "flash_attn", "flash_attn_qkvpacked_func", _release_2, (8, 9, 10, 11, 12), 256),
)


@cache
def _refusal(backend: Backend, major: int) -> str | None:
    """Why a backend cannot run on GPUs of this capability here; None if it can."""
    if major not in backend.majors:
        return f"not for compute capability {major}.x"
    try:
        getattr(import_module(backend.module), backend.function)
    except (ImportError, OSError, AttributeError) as error:
        return str(error)
    return None


def attention_backends(device: torch.device, dtype: torch.dtype, channels: int = 64) -> dict[str, str]:
    """Every implementation in the order of preference, with why it is not taken; the one that is has an empty reason.

    Args:
        device: where the tensors are.
        dtype: of the tensors.
        channels: K, of one head.
    """
    if device.type != "cuda":
        refused = native.refusal(device, dtype, channels)
        return {"native": refused, "sdpa": ""} if refused else {"native": ""}
    reasons = {}
    for backend in BACKENDS:
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
    """Which implementation `attention` takes: `flash-attn-4`, `-3` or `-2` on GPUs, `native` on CPUs
    with bf16 instructions, else `sdpa`, torch's own.

    The arguments are those of `attention_backends`, which says why it was not an earlier one.
    """
    name: str = _choice(device, dtype, channels)
    return name


# What is installed does not change while a compiled program runs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choice(device: torch.device, dtype: torch.dtype, channels: int) -> str:
    return list(attention_backends(device, dtype, channels))[-1]


def attention(qkv: Tensor, queries: int | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v over all tokens of a clip, without mask and dropout.

    Args:
        qkv: (B, N, 3, H, K), any floating dtype.
        queries: only the last so many tokens ask (Q); all of them if None.

    Returns:
        (B, Q, H * K), same dtype.
    """
    name = attention_backend(qkv.device, qkv.dtype, qkv.shape[-1])
    for backend in BACKENDS:
        if backend.name == name:
            return backend.attend(qkv, queries).flatten(2)
    # A compiled program takes what the compiler can see through.
    if name == "native" and not torch.compiler.is_compiling():
        return native.attention(qkv, queries or qkv.shape[1]).flatten(2)
    return twin(qkv, queries)
