"""Choice of the implementation of an operator: its Triton kernel or its plain-torch reference."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


# A constant for torch.compile: the installed packages do not change while a compiled program runs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and the GPU is Ampere (compute capability 8.0) or newer."""
    return _installed() and torch.cuda.get_device_capability(device) >= (8, 0)


def uses_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernel is used for this tensor.

    `torch.export` gets torch's own operators only, so that the exported program runs without this package.
    """
    return tensor.is_cuda and not torch.compiler.is_exporting() and bool(_runs_triton(tensor.device))
