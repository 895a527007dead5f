"""One launch of a Triton kernel as data: a GPU runs it, Triton's interpreter runs it, `resources` compiles it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is called with.

    Attributes:
        kernel: the jitted function.
        programs: how many programs run.
        arguments: tensors, numbers and None, by the names of the kernel's parameters.
        constants: its `tl.constexpr` parameters.
        warps: of each program.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int

    def run(self) -> None:
        """Launch on the device of the tensors, which need not be the current one."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.warps)


def block(width: int) -> int:
    """The power of two that holds a row."""
    return triton.next_power_of_2(width)


def warps(width: int) -> int:
    """Of a program that holds a row in registers: 8 values a thread, up to 16 warps."""
    return min(max(block(width) // 256, 1), 16)


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself if the values of a row lie side by side, a copy otherwise."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
