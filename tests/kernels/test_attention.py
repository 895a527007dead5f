"""`attention` against the softmax written out."""

from __future__ import annotations

import pytest
import torch

from mvd_kernels import attention, attention_backend


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("clips", "tokens", "heads", "channels"), [(1, 1, 1, 8), (2, 7, 3, 16), (3, 130, 2, 24)])
def test_attention_is_softmax_attention(
    clips: int, tokens: int, heads: int, channels: int, dtype: torch.dtype, tolerance: float
) -> None:
    qkv = torch.randn(clips, tokens, 3, heads, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    fused, plain = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    q, k, v = plain.permute(2, 0, 3, 1, 4)
    expected = ((q @ k.mT) / channels**0.5).softmax(-1) @ v
    expected = expected.transpose(1, 2).reshape(clips, tokens, heads * channels)
    result = attention(fused)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    result.double().square().sum().backward()
    expected.square().sum().backward()
    assert fused.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(fused.grad.double(), plain.grad, atol=10 * tolerance, rtol=10 * tolerance)


def test_a_cpu_takes_torch() -> None:
    assert attention_backend(torch.device("cpu"), torch.bfloat16) == "sdpa"
