"""flash-attention 4 as an operator of torch.

Releases 2 and 3 are custom operators. Release 4 (`flash_attn.cute`) is an autograd function in Python that compiles its
kernels at their first call and reads the memory of its tensors, which torch.compile cannot trace.

Legend: B clips, N tokens, Q queries, H heads, K channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("mvd_kernels::flash_attention_4", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (B, Q, H, K), and the logarithms of the sums of the softmax, float32 (B, H, Q)."""
    from flash_attn.cute.interface import _flash_attn_fwd

    # Newer releases return more.
    attended, log_sums = _flash_attn_fwd(query, key, value, return_lse=True)[:2]
    return attended, log_sums


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    clips, queries, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(clips, heads, queries, dtype=torch.float32)


@torch.library.custom_op("mvd_kernels::flash_attention_4_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, attended: Tensor, log_sums: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `query`, `key` and `value`."""
    from flash_attn.cute.interface import _flash_attn_bwd

    gradients = _flash_attn_bwd(query, key, value, attended, upstream, log_sums)
    return gradients[0], gradients[1], gradients[2]


@_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, attended: Tensor, log_sums: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(*ctx.saved_tensors, upstream)
    return gradients


_forward.register_autograd(_differentiate, setup_context=_save)


def flash_attention_4(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v from q (B, Q, H, K), k and v (B, N, H, K): (B, Q, H, K), same dtype."""
    attended: Tensor = _forward(query, key, value)[0]
    return attended
