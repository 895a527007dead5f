"""Kernels against their references.

The reference computes on the CPU in float32 from the same rounded values. An error is the largest difference over the
largest value, of outputs and of gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mvd_kernels

from .conftest import Figure
from .kernel_cases import CASES, Case, Inputs

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""A few roundings of each dtype. Sums over many rows (gradients of weights) keep to it relative to their largest."""


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_equals_its_twin(case: Case, dtype: torch.dtype, gpu: torch.device, figure: Figure) -> None:
    kernel: Any = getattr(mvd_kernels, case.kernel)
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip(f"{torch.cuda.get_device_name(gpu)} has no bf16")
    rounded = {name: _cast(tensor, dtype) for name, tensor in case.inputs(torch.Generator().manual_seed(0)).items()}
    here = {name: _leaf(tensor.to(gpu), name in case.gradients) for name, tensor in rounded.items()}
    reference = {name: _leaf(_cast(tensor, torch.float32), name in case.gradients) for name, tensor in rounded.items()}
    results = _outputs(case.call(kernel, here, dtype))
    expected = _outputs(case.call(kernel, reference, torch.float32))
    errors = {"outputs": max(map(_error, results, expected))}
    if case.gradients:
        errors["gradients"] = _gradient_error(results, expected, here, reference, case.gradients)
    for name, error in errors.items():
        figure(f"error of {name}", error)
    assert max(errors.values()) < TOLERANCE[dtype], errors


def _gradient_error(
    results: list[Tensor], expected: list[Tensor], here: Inputs, reference: Inputs, names: tuple[str, ...]
) -> float:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(tensor.shape, generator=generator) for tensor in expected]
    if not expected[0].dim():
        # A mean over many values has gradients too small for fp16, as they are without a loss scale.
        weights = [torch.tensor(float(max(reference[name].numel() for name in names)))]
    weights = [weight.to(result.dtype) for weight, result in zip(weights, results, strict=True)]
    torch.autograd.backward(results, [weight.to(r.device) for weight, r in zip(weights, results, strict=True)])
    torch.autograd.backward(expected, [weight.float() for weight in weights])
    pairs = [(here[name].grad, reference[name].grad) for name in names]
    assert all(got is not None and wanted is not None for got, wanted in pairs)
    return max(_error(got, wanted) for got, wanted in pairs if got is not None and wanted is not None)


def _error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    return float((got.detach().cpu().float() - wanted.detach()).abs().max() / wanted.detach().abs().max())


def _outputs(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _leaf(tensor: Tensor, wants_gradient: bool) -> Tensor:
    return tensor.detach().clone().requires_grad_(wants_gradient)
