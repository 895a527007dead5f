"""The input of a decoder, token by token; the kernel against its reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mvd_kernels import decoder_input

from .conftest import Evaluate
from .evaluation import Call, evaluate


def call(class_tokens: int, width: int, dtype: torch.dtype, decoders: int = 1) -> Call:
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(2 * decoders, class_tokens + 3, width, generator=generator).to(dtype)
    mask_token = torch.randn(decoders, 1, width, generator=generator).to(dtype)
    positions = torch.randn(8, width, generator=generator)
    visible, masked = torch.tensor([[0, 2, 5], [1, 6, 7]]), torch.tensor([[1, 3, 4, 7], [0, 2, 3, 5]])
    return Call("decoder_input", (embedded, mask_token, positions, visible, masked), gradients=(0, 1))


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_each_token_stands_in_its_place(class_tokens: int) -> None:
    embedded, mask_token, positions, visible, masked = call(class_tokens, 5, torch.float32).arguments
    tokens = decoder_input(embedded, mask_token, positions, visible, masked)
    assert tokens.shape == (2, class_tokens + 7, 5)
    for clip in range(2):
        seen = [embedded[clip, class_tokens + i] + positions[visible[clip, i]] for i in range(3)]
        hidden = [mask_token[0, 0] + positions[masked[clip, i]] for i in range(4)]
        assert torch.equal(tokens[clip], torch.stack([*embedded[clip, :class_tokens], *seen, *hidden]))


def test_each_decoder_has_its_mask_token() -> None:
    embedded, mask_tokens, *others = call(1, 5, torch.float32, decoders=3).arguments
    parts = [decoder_input(embedded[2 * i : 2 * i + 2], mask_tokens[i : i + 1], *others) for i in range(3)]
    assert torch.equal(decoder_input(embedded, mask_tokens, *others), torch.cat(parts))


def test_clips_that_are_not_of_every_decoder_are_refused() -> None:
    embedded, mask_tokens, *others = call(0, 5, torch.float32, decoders=2).arguments
    with pytest.raises(ValueError, match=r"3 clips: expected 2 decoders \(`mask_token`\) x 2 clips \(`visible`\)"):
        decoder_input(embedded[:3], mask_tokens, *others)


def test_missing_tokens_are_refused() -> None:
    embedded, *rest = call(0, 5, torch.float32).arguments
    with pytest.raises(ValueError, match="2 tokens, fewer than the 3 of `visible`"):
        decoder_input(embedded[:, :2], *rest)


def assert_alike(kernel: Evaluate, call: Call, tolerance: float) -> None:
    results, gradients = kernel(call)
    expected, expected_gradients = evaluate(call, "reference")
    for result, wanted in zip([*results, *gradients], [*expected, *expected_gradients], strict=True):
        assert result.dtype == wanted.dtype
        torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("class_tokens", [0, 1])
@pytest.mark.parametrize(("width", "decoders"), [(5, 1), (130, 1), (5, 3)])
def test_kernel_equals_twin(
    kernel: Evaluate, width: int, decoders: int, class_tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_alike(kernel, call(class_tokens, width, dtype, decoders), tolerance)


def test_kernel_takes_views(kernel: Evaluate) -> None:
    first = call(1, 6, torch.float32)
    embedded, mask_token, positions, visible, masked = first.arguments
    transposed = (embedded.mT.contiguous().mT, mask_token, positions.T.contiguous().T, visible.T.contiguous().T, masked)
    assert_alike(kernel, replace(first, arguments=transposed), 1e-6)
    sliced = (embedded, mask_token, positions.repeat(1, 2)[:, 6:], visible, masked.repeat(1, 2)[:, 2:6])
    assert_alike(kernel, replace(first, arguments=sliced), 1e-6)


def test_a_compiled_program_keeps_the_kernel_whole(kernel: Evaluate) -> None:
    assert_alike(kernel, replace(call(1, 5, torch.float32), compiled=True), 1e-6)
