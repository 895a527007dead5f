"""Benchmark of `decoder_input`: decoders of ViT-B and ViT-L."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mvd_kernels.bench.case import BenchmarkCase, clips, implementations, leaf, precision, split_tokens


def cases(device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield cases of 160 visible and 1408 masked tokens."""
    count, dtype = clips(device), precision(device)
    visible, masked = split_tokens(count, device)
    for model, width in (("B", 384), ("L", 512)):
        embedded = leaf(count, 160, width, device=device, dtype=dtype)
        mask_token = leaf(1, 1, width, device=device, dtype=dtype)
        positions = torch.randn(1568, width, device=device)
        calls = implementations("decoder_input", device, embedded, mask_token, positions, visible, masked)
        read, written = embedded.nbytes + positions.nbytes, count * 1568 * width * dtype.itemsize
        shape = f"{model}: B {count}, V 160, M 1408, D {width}"
        yield BenchmarkCase(shape, dtype, calls, (embedded, mask_token), read=read, written=written)
