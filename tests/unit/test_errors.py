"""Errors of a GPU that a restart may survive, and the exit code of the command line after them."""

from __future__ import annotations

import sys

import pytest
import torch

from mvd_scale import cli
from mvd_scale.errors import FAULT_CODE, is_device_fault

ADVICE = """
CUDA kernel errors might be asynchronously reported at some other API call.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
"""Lines that torch appends to the text of every error of a GPU."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.AcceleratorError(f"CUDA error: uncorrectable ECC error encountered{ADVICE}"), True),
        (torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{ADVICE}"), True),
        (torch.AcceleratorError(f"HIP error: unspecified launch failure{ADVICE}"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (torch.AcceleratorError(f"CUDA error: out of memory{ADVICE}"), False),
        (torch.AcceleratorError(f"CUDA error: device-side assert triggered{ADVICE}"), False),
        (torch.AcceleratorError(f"CUDA error: no kernel image is available for execution{ADVICE}"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("the text of a CUDA error: in the middle"), False),
        (ValueError("CUDA error: no RuntimeError"), False),
    ],
)
def test_a_gpu_that_fails_is_a_fault_and_an_error_of_the_program_is_none(error: Exception, expected: bool) -> None:
    assert is_device_fault(error) == expected


def test_the_command_ends_with_the_code_of_a_fault_after_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(cli, "cli", fail)
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    monkeypatch.setattr(cli, "_collect_garbage_rarely", lambda: None)
    monkeypatch.setattr(sys, "argv", ["mvd-scale"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == FAULT_CODE
    printed = capsys.readouterr().err
    assert printed.count("Traceback") == 1
    assert "ECC" in printed
