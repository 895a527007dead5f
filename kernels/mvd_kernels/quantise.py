"""Floating activations to 8 bits.

Legend: S sequences.
"""

from __future__ import annotations

from torch import Tensor

from mvd_kernels.native import quantise as native
from mvd_kernels.twins.quantise import quantise as twin


def quantise(sequences: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers as 8-bit levels of a range that reaches from the least to the greatest and holds 0.

    Args:
        sequences: float32 or bfloat16 (S, ...), each with a range of its own; on the CPU.
        levels: the highest level, at most 255; the lowest is 0.

    Returns:
        uint8 levels (S, ...), float32 steps (S,) between two of them, int32 levels (S,) of 0. A sequence with a number
        that is not finite has a step that is not a number, and levels of no meaning.
    """
    if native.takes(sequences):
        return native.quantise(sequences, levels)
    return twin(sequences, levels)
