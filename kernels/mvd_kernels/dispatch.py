"""Choice of the implementation of an operator: its Triton kernel or its plain-torch reference."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from mvd_kernels.triton_compiler import triton_refusal

logger = logging.getLogger("mvd_kernels")


# A constant for torch.compile: neither the packages nor the compiler change while a compiled program runs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_triton(device: torch.device) -> bool:
    """Whether Triton works here and the GPU is Ampere (compute capability 8.0) or newer."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    refusal = triton_refusal()
    if refusal:
        _warn_once(refusal)
    return not refusal


@cache
def _warn_once(refusal: str) -> None:
    logger.warning("plain torch, which is slower, computes in place of the Triton kernels: %s", refusal)


def uses_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernel is used for this tensor.

    `torch.export` gets torch's own operators only, so that the exported program runs without this package.
    """
    return tensor.is_cuda and not torch.compiler.is_exporting() and bool(_runs_triton(tensor.device))
