"""Benchmark of `add_layer_norm`: the student's visible tokens and all tokens, widths of ViT-B and ViT-L."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mvd_kernels.bench.case import BenchmarkCase, clips, implementations, leaf, precision


def cases(device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield cases of 160 and 1568 tokens."""
    count, dtype = clips(device), precision(device)
    for model, width in (("B", 768), ("L", 1024)):
        for tokens in (160, 1568):
            shapes = ((count, tokens, width), (count, tokens, width), (width,), (width,))
            inputs = tuple(leaf(*shape, device=device, dtype=dtype) for shape in shapes)
            calls = implementations("add_layer_norm", device, *inputs)
            moved = 2 * inputs[0].nbytes
            shape = f"{model}: B {count}, N {tokens}, D {width}"
            yield BenchmarkCase(shape, dtype, calls, inputs, read=moved, written=moved)
