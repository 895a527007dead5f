"""Launch of a Triton kernel as data, so that a GPU or Triton's interpreter can run it and `resources` compile it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with all its arguments.

    Attributes:
        kernel: the function decorated by `triton.jit`.
        programs: number of programs (size of the one-dimensional grid).
        arguments: tensors, numbers and None by the names of the kernel's parameters.
        constants: values of its `tl.constexpr` parameters.
        warps: warps per program.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int

    def run(self) -> None:
        """Launch the kernel on the device of its tensors, which need not be the current device."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.warps)


def block(width: int) -> int:
    """Smallest power of two that is at least the width of a row."""
    return triton.next_power_of_2(width)


def warps(width: int) -> int:
    """Warps of a program that holds a row in registers: 8 values per thread, 1 to 16 warps."""
    return min(max(block(width) // 256, 1), 16)


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor itself if the values of its last axis are contiguous, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
