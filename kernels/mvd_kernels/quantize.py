"""Quantization of floating activations to 8 bits.

Legend: S sequences.
"""

from __future__ import annotations

from torch import Tensor

from mvd_kernels.native import quantize as native
from mvd_kernels.reference.quantize import quantize as reference


def quantize(sequences: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each sequence to 8-bit levels of the range from its minimum to its maximum, extended to contain 0.

    Args:
        sequences: float32 or bfloat16 (S, ...), on the CPU.
        levels: highest level, at most 255; the lowest is 0.

    Returns:
        uint8 levels (S, ...), float32 step between two levels (S,), int32 level that represents 0 (S,). A sequence with
        a value that is not finite gets the step NaN, and its levels are undefined.
    """
    if native.supports(sequences):
        return native.quantize(sequences, levels)
    return reference(sequences, levels)
