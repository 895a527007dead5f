"""Quantization of activations to 8 bits in two passes over memory; torch's operators need eight."""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_kernels.native.library import call, library


def supports(sequences: Tensor) -> bool:
    """Whether the C++ function can quantize these sequences (dtype, and a compiler is available)."""
    return sequences.dtype in (torch.bfloat16, torch.float32) and library() is not None


def quantize(sequences: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `mvd_kernels.quantize`."""
    sequences = sequences.contiguous()
    count = len(sequences)
    result = torch.empty_like(sequences, dtype=torch.uint8)
    steps, zeros = (sequences.new_empty(count, dtype=dtype) for dtype in (torch.float32, torch.int32))
    name = "mvd_quantize_bf16" if sequences.dtype == torch.bfloat16 else "mvd_quantize_fp32"
    if count:
        call(name, (sequences, result, steps, zeros), count, sequences[0].numel(), levels)
    return result, steps, zeros
