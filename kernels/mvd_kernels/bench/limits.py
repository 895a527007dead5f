"""Measured limits of a device, to which the speed of operators and steps is compared."""

from __future__ import annotations

import torch

from mvd_kernels.bench.timing import milliseconds, seconds
from mvd_kernels.native.attention import bf16_instructions

PRODUCTS = 5
"""Number of timed matrix products."""


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bandwidth of a large copy on the device: bytes read and written per second."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    _, median, _ = milliseconds(lambda: target.copy_(source), device)
    return 2 * source.numel() / median * 1000


def product_side(device: torch.device, dtype: torch.dtype) -> int:
    """Side of the matrices of `product_flops`: 8192 on a GPU, 2048 on a CPU.

    512 in a 16-bit dtype on a CPU without instructions for bf16, on which a product of side 2048 takes 20 s.
    """
    if device.type == "cuda":
        return 8192
    return 2048 if dtype == torch.float32 or bf16_instructions() else 512


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of large products of square matrices of random values: the best of `PRODUCTS`."""
    side = product_side(device, dtype)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: left @ right, left.device) for _ in range(PRODUCTS))
