"""The cases of the kernels' check are whole, and can be called. This needs no GPU."""

from __future__ import annotations

import pytest
import torch

import mvd_kernels
from mvd_kernels.verification.cases import CASES, Case
from mvd_kernels.verification.errors import TOLERANCE, measure_errors, relative_error

NO_KERNELS = {
    "AddLayerNorm",  # holds the weights of add_layer_norm
    "AttentionWays",  # for CPUs only, as are the following
    "Int8Linear",
    "Linear",
    "LinearWays",
    "linear",
    "attention_backend",
    "attention_backends",
    "bf16_instructions",
    "max_pixel_value",
}


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """The references run on any machine."""


def test_every_kernel_has_a_case() -> None:
    assert {case.kernel for case in CASES} == set(mvd_kernels.__all__) - NO_KERNELS


ODD = [case for case in CASES if "ViT" not in case.title]


@pytest.mark.parametrize("case", ODD, ids=str)
def test_a_case_can_be_called(case: Case) -> None:
    inputs = case.inputs(torch.Generator().manual_seed(0))
    result = case.call(getattr(mvd_kernels, case.kernel), inputs, torch.float32)
    for tensor in [result] if isinstance(result, torch.Tensor) else result:
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("case", ODD, ids=str)
def test_rounding_alone_keeps_to_the_tolerance(case: Case) -> None:
    errors = measure_errors(case, torch.float32, torch.device("cpu"))
    assert set(errors) == ({"outputs", "gradients"} if case.gradients else {"outputs"})
    assert max(errors.values()) < TOLERANCE[torch.float32]


def test_values_that_are_not_finite_are_an_error() -> None:
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25
