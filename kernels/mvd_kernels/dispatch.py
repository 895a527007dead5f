"""Who computes an operator: its Triton kernel or its plain-torch twin."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


# What is installed does not change while a compiled program runs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and the GPU is one that the kernels are compiled for (Ampere and newer)."""
    return _installed() and torch.cuda.get_device_capability(device) >= (8, 0)


def takes_kernel(tensor: Tensor) -> bool:
    """Whether the Triton kernel computes on this tensor.

    A program that is exported keeps to torch's own operators, so that it runs where this package is not installed.
    """
    return tensor.is_cuda and not torch.compiler.is_exporting() and bool(_runs_triton(tensor.device))
