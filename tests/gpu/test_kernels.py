"""Kernels against their references."""

from __future__ import annotations

import pytest
import torch

from mvd_kernels.verification.cases import CASES, Case
from mvd_kernels.verification.errors import TOLERANCE, measure_errors

from .conftest import Figure

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_equals_its_reference(case: Case, dtype: torch.dtype, gpu: torch.device, figure: Figure) -> None:
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip(f"{torch.cuda.get_device_name(gpu)} has no bf16")
    errors = measure_errors(case, dtype, gpu)
    for name, error in errors.items():
        figure(f"error of {name}", error)
    assert max(errors.values()) < TOLERANCE[dtype], errors
