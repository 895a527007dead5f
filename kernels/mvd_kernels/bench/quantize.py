"""Benchmark of `quantize` on CPUs: inputs of the 8-bit linear layers of teachers; MLPs of ViT-B and ViT-L."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mvd_kernels.bench.case import BenchmarkCase, clips
from mvd_kernels.native import quantize as native
from mvd_kernels.reference.quantize import quantize


def cases(device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield cases of the MLP's hidden activations of whole clips; none on GPUs, which use fp8."""
    for model, channels in (("B", 3072), ("L", 4096)) if device.type == "cpu" else ():
        sequences = torch.randn(clips(device), 1568, channels, dtype=torch.bfloat16)
        implementations: dict[str, Callable[[], Any]] = {"reference": partial(quantize, sequences, 255)}
        if native.supports(sequences):
            implementations["native"] = partial(native.quantize, sequences, 255)
        yield BenchmarkCase(f"{model}: B {len(sequences)}, N 1568, D {channels}", torch.bfloat16, implementations)
