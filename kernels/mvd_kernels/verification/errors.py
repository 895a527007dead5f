"""Errors of an operator on a device, against the same operator in float32 on the CPU, from the same rounded values.

An error is the largest difference over the largest value, of outputs and of gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mvd_kernels
from mvd_kernels.verification.cases import Case, Inputs

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""A few roundings of each dtype. Sums over many rows (gradients of weights) keep to it relative to their largest."""


def measure_errors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Measure the errors of a case in a dtype: of `outputs` and, if it has gradients, of `gradients`.

    Values that are not finite give an infinite error.
    """
    operator: Any = getattr(mvd_kernels, case.kernel)
    rounded = {name: _cast(tensor, dtype) for name, tensor in case.inputs(torch.Generator().manual_seed(0)).items()}
    here = {name: _leaf(tensor.to(device), name in case.gradients) for name, tensor in rounded.items()}
    reference = {name: _leaf(_cast(tensor, torch.float32), name in case.gradients) for name, tensor in rounded.items()}
    results = _outputs(case.call(operator, here, dtype))
    expected = _outputs(case.call(operator, reference, torch.float32))
    errors = {"outputs": max(map(relative_error, results, expected))}
    if case.gradients:
        errors["gradients"] = _gradient_error(results, expected, here, reference, case.gradients)
    return errors


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference of two tensors of one shape over the largest absolute value of the second one."""
    assert got.shape == wanted.shape
    got, wanted = got.detach().cpu().float(), wanted.detach().cpu().float()
    error = float((got - wanted).abs().max() / wanted.abs().max())
    # A comparison with NaN is false, so that it would pass for the smallest of several errors.
    return error if torch.isfinite(got).all() and error < float("inf") else float("inf")


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
    return max(relative_error(got, wanted) for got, wanted in pairs if got is not None and wanted is not None)


def _outputs(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _leaf(tensor: Tensor, wants_gradient: bool) -> Tensor:
    return tensor.detach().clone().requires_grad_(wants_gradient)
