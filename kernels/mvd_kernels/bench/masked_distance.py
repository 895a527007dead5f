"""Benchmark of `masked_distance`: decoder outputs against features of a teacher, ViT-B and ViT-L."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mvd_kernels.bench.case import BenchmarkCase, clips, implementations, leaf, precision, split_tokens


def cases(device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield cases of smooth L1, the published distance, with and without the target norm."""
    count, dtype = clips(device), precision(device)
    _, masked = split_tokens(count, device)
    for model, width in (("B", 768), ("L", 1024)):
        predictions = leaf(count, 1408, width, device=device, dtype=dtype)
        features = torch.randn(count, 1568, width, device=device, dtype=dtype)
        for norm in (False, True):
            calls = implementations(
                "masked_distance", device, predictions, features, masked, distance="smooth_l1", norm=norm
            )
            shape = f"{model}: B {count}, M 1408, D {width}{', norm' if norm else ''}"
            yield BenchmarkCase(shape, dtype, calls, (predictions,), read=2 * predictions.nbytes + masked.nbytes)
