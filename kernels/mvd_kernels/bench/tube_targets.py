"""Benchmark of `tube_targets`: the masked tokens of a clip, for every normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mvd_kernels.bench.case import BenchmarkCase, clips, implementations, split_tokens
from mvd_kernels.bench.tube_rows import TUBE


def cases(device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield cases of clips of 16x224x224 in tubes of 2x16x16, which are the same for ViT-B and ViT-L."""
    count = clips(device)
    pixels = torch.randint(0, 256, (count, 16, 224, 224, 3), dtype=torch.uint8, device=device)
    _, masked = split_tokens(count, device)
    for normalize in ("none", "channel", "patch"):
        calls = implementations("tube_targets", device, pixels, masked, tubelet=2, patch=16, normalize=normalize)
        read = count * 1408 * TUBE
        shape = f"B, L: B {count}, K 1408, {normalize}"
        yield BenchmarkCase(shape, torch.float32, calls, read=read, written=4 * read)
