"""Check of an attention in bfloat16 against the reference in float32, in both directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mvd_kernels.reference.attention import attention as reference


def check_attention(attend: Callable[[Tensor], Tensor], shape: tuple[int, ...], queries: int) -> None:
    """Compare the output and the gradient of `attend` with those of the reference.

    Args:
        attend: attention of the last `queries` tokens of packed tokens in bfloat16.
        shape: shape of the packed tokens, (B, N, 3, H, C).
        queries: number of tokens that attend.
    """
    torch.manual_seed(0)
    ours = torch.randn(shape).bfloat16().requires_grad_()
    true = ours.detach().float().requires_grad_()
    result, expected = attend(ours), reference(true, queries)
    assert result.dtype == torch.bfloat16
    # Half a step of bf16 is 0.2 to 0.4 % of a number.
    assert (result.float() - expected).norm() < 0.004 * expected.norm()
    upstream = torch.randn_like(expected).bfloat16()
    (gradient,) = torch.autograd.grad(result, ours, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, true, upstream.float())
    for part in range(3):
        off, whole = gradient[:, :, part].float() - expected_gradient[:, :, part], expected_gradient[:, :, part]
        assert off.norm() < 0.01 * whole.norm()
    assert not gradient[:, : shape[1] - queries, 0].any()
