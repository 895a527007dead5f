"""Promises of attention in chunks: what torch's own kernel gives, forward and backward, however many tokens ask."""

import pytest
import torch
from torch.nn import functional as F

from mvd_kernels import attention, chunked_attention


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_attention, "CHUNK", 7)


@pytest.mark.parametrize("queries", [20, 7, 1, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_attention(dtype: torch.dtype, queries: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 20, 3, 3, 8)
    expected_from, ours_from = (qkv.to(dtype).to(kind).requires_grad_() for kind in (torch.float32, dtype))
    query, key, value = expected_from.permute(2, 0, 3, 1, 4).unbind(0)
    expected = F.scaled_dot_product_attention(query[:, :, -queries:], key, value).transpose(1, 2)
    ours = chunked_attention.chunked_attention(ours_from, queries)
    assert ours.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.03}
    torch.testing.assert_close(ours.float(), expected, **tolerance)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (ours * weights.to(dtype)).sum().backward()
    assert expected_from.grad is not None
    assert ours_from.grad is not None
    torch.testing.assert_close(ours_from.grad.float(), expected_from.grad, **tolerance)


@pytest.mark.parametrize("pays", [False, True])
def test_the_last_tokens_ask_and_all_answer(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    monkeypatch.setattr(chunked_attention, "pays", lambda qkv: pays)
    qkv = torch.randn(2, 20, 3, 3, 8)
    torch.testing.assert_close(attention(qkv, 6), attention(qkv)[:, -6:])


def test_it_is_not_taken_for_float32_or_short_clips() -> None:
    assert not chunked_attention.pays(torch.empty(1, 1568, 3, 2, 8))
    assert not chunked_attention.pays(torch.empty(1, 160, 3, 2, 8, dtype=torch.bfloat16))
    with_instructions = chunked_attention.bf16_instructions()
    assert chunked_attention.pays(torch.empty(1, 1568, 3, 2, 8, dtype=torch.bfloat16)) == with_instructions
