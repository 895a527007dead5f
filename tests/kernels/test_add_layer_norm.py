"""A residual sum and its LayerNorm against their formulas, the kernel against its reference, with all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mvd_kernels import add_layer_norm

from .conftest import Evaluate
from .evaluation import Call, evaluate


def call(rows: tuple[int, ...], width: int, dtype: torch.dtype) -> Call:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    arguments = (draw(*rows, width), draw(*rows, width), 1 + draw(width) / 4, draw(width))
    return Call("add_layer_norm", arguments, {"eps": 1e-5}, (0, 1, 2, 3))


def test_results_and_gradients_follow_the_formula() -> None:
    once = call((2, 3), 7, torch.float64)
    residual, update, weight, bias = (a.requires_grad_() for a in once.arguments)
    total = residual + update
    white = (total - total.mean(-1, keepdim=True)) / (total.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    for result, expected in zip(
        add_layer_norm(residual, update, weight, bias, 1e-5), (total, white * weight + bias), strict=True
    ):
        torch.testing.assert_close(result, expected)


def test_inputs_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="must have the same shape and dtype"):
        add_layer_norm(torch.ones(2, 3, 4), torch.ones(1, 3, 4), torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="must have the same shape and dtype"):
        add_layer_norm(torch.ones(3, 4), torch.ones(3, 4).half(), torch.ones(4), torch.ones(4))


def test_norms_that_do_not_divide_the_first_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="2 norms for 3 entries"):
        add_layer_norm(torch.ones(3, 4), torch.ones(3, 4), torch.ones(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"weight \(2, 2\) and bias \(2,\) must have the same shape"):
        add_layer_norm(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), torch.ones(2))


def of_several(norms: int, rows: tuple[int, ...], width: int, dtype: torch.dtype) -> Call:
    first = call((norms * rows[0], *rows[1:]), width, dtype)
    residual, update, *_ = first.arguments
    generator = torch.Generator().manual_seed(1)
    affine = (torch.randn(norms, width, generator=generator).to(dtype) for _ in range(2))
    return replace(first, arguments=(residual, update, *affine))


def test_each_part_of_the_first_axis_has_its_norm() -> None:
    residual, update, weight, bias = of_several(3, (2, 4), 5, torch.float32).arguments
    sums, normed = add_layer_norm(residual, update, weight, bias, 1e-5)
    for norm in range(3):
        mine = slice(2 * norm, 2 * norm + 2)
        expected = add_layer_norm(residual[mine], update[mine], weight[norm], bias[norm], 1e-5)
        assert torch.equal(sums[mine], expected[0])
        assert torch.equal(normed[mine], expected[1])


def assert_alike(kernel: Evaluate, call: Call, tolerance: float) -> None:
    results, gradients = kernel(call)
    expected, expected_gradients = evaluate(call, "reference")
    for result, wanted in zip([*results, *gradients], [*expected, *expected_gradients], strict=True):
        assert result.dtype == wanted.dtype
        assert result.shape == wanted.shape
        torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize(("rows", "width"), [((2, 3), 5), ((37,), 40), ((1, 2), 130)])
def test_kernel_equals_twin(
    kernel: Evaluate, rows: tuple[int, ...], width: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_alike(kernel, call(rows, width, dtype), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_kernel_equals_twin_with_several_norms(kernel: Evaluate, dtype: torch.dtype, tolerance: float) -> None:
    # More rows of a norm than a program takes backwards.
    assert_alike(kernel, of_several(3, (1, 37), 5, dtype), tolerance)
    assert_alike(kernel, replace(of_several(2, (2, 3), 40, dtype), compiled=True), tolerance)


def test_kernel_takes_transposed_rows(kernel: Evaluate) -> None:
    first = call((3,), 6, torch.float32)
    residual, update, weight, bias = first.arguments
    assert_alike(kernel, replace(first, arguments=(residual.T.contiguous().T, update, weight, bias)), 2e-5)


def test_kernel_takes_slices(kernel: Evaluate) -> None:
    first = call((2, 4), 6, torch.float32)
    residual, update, weight, bias = first.arguments
    sliced = (residual[:, 1:], update.mT.contiguous().mT[:, :3], weight.repeat(2)[::2], bias)
    assert_alike(kernel, replace(first, arguments=sliced), 2e-5)


def test_a_compiled_program_keeps_the_kernel_whole(kernel: Evaluate) -> None:
    assert_alike(kernel, replace(call((2, 3), 5, torch.float32), compiled=True), 2e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_gradients(kernel: Evaluate, used: int) -> None:
    assert_alike(kernel, replace(call((2, 3), 5, torch.float32), used=(used,)), 2e-5)
