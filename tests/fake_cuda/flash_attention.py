"""Stand-in for the package flash-attn 2: its functions' signatures and demands, as custom operators without kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mvd_kernels.attention import FlashAttentionRelease


@torch.library.custom_op("tests_fake_cuda::flash_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("there are no values")


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    clips, queries, heads, channels = query.shape
    for tensor in (query, key, value):
        assert tensor.is_cuda
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.dtype == query.dtype
        assert tensor.stride(-1) == 1
    assert key.shape == value.shape
    assert (key.shape[0], key.shape[2], key.shape[3]) == (clips, heads, channels)
    assert channels % 8 == 0
    assert channels <= 256
    return query.new_empty(query.shape), query.new_empty(clips, heads, queries, dtype=torch.float32)


@torch.library.custom_op("tests_fake_cuda::flash_attention_backward", mutates_args=())
def _backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("there are no values")


@_backward.register_fake
def _(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    assert upstream.shape == output.shape
    assert upstream.dtype == output.dtype
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, upstream: Tensor, of_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(upstream, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """Attend: (B, Q, H, K), (B, N, H, K), (B, N, H, K) to (B, Q, H, K)."""
    attended: Tensor = _forward(q, k, v)[0]
    return attended


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """Attend: (B, N, 3, H, K) to (B, N, H, K)."""
    assert qkv.shape[2] == 3
    return flash_attn_func(*qkv.unbind(2))


@contextmanager
def flash_attention_2() -> Iterator[None]:
    """Make the stand-in the only release of flash-attn that is installed."""
    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func  # type: ignore[attr-defined]

    def refusal(release: FlashAttentionRelease, major: int) -> str | None:
        return None if release.name == "flash-attn-2" else "not installed"

    with ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, {"flash_attn": module}))
        stack.enter_context(patch("mvd_kernels.attention._refusal", refusal))
        yield
