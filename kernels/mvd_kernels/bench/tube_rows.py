"""Benchmark of `tube_rows`: visible tokens of the student, all tokens of a teacher."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mvd_kernels.bench.case import BenchmarkCase, clips, implementations, precision, split_tokens
from mvd_kernels.tubes import IMAGENET_MEAN, IMAGENET_STD

TUBE = 2 * 16 * 16 * 3
"""Values of a tube."""


def cases(device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield cases of clips of 16x224x224 in tubes of 2x16x16, which are the same for ViT-B and ViT-L."""
    count, dtype = clips(device), precision(device)
    pixels = torch.randint(0, 256, (count, 16, 224, 224, 3), dtype=torch.uint8, device=device)
    visible, _ = split_tokens(count, device)
    tube = {"tubelet": 2, "patch": 16, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "dtype": dtype}
    for chosen, tokens in ((160, visible), (1568, None)):
        calls = implementations("tube_rows", device, pixels, tokens, **tube)
        read = count * chosen * TUBE
        yield BenchmarkCase(f"B, L: B {count}, K {chosen}", dtype, calls, read=read, written=read * dtype.itemsize)
