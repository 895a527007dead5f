"""The cases of the kernels' check are whole, and can be called. This needs no GPU."""

from __future__ import annotations

import pytest
import torch

import mvd_kernels

from .kernel_cases import CASES, Case

NO_KERNELS = {
    "AddLayerNorm",  # holds the weights of add_layer_norm
    "Int8Linear",  # for CPUs only
    "attention_backend",
    "attention_backends",
    "bf16_instructions",
}


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """The references run on any machine."""


def test_every_kernel_has_a_case() -> None:
    assert {case.kernel for case in CASES} == set(mvd_kernels.__all__) - NO_KERNELS


@pytest.mark.parametrize("case", [case for case in CASES if "ViT" not in case.title], ids=str)
def test_a_case_can_be_called(case: Case) -> None:
    inputs = case.inputs(torch.Generator().manual_seed(0))
    result = case.call(getattr(mvd_kernels, case.kernel), inputs, torch.float32)
    for tensor in [result] if isinstance(result, torch.Tensor) else result:
        assert torch.isfinite(tensor).all()
