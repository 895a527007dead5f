"""Benchmark of `attention`: flash-attn or C++ if available, and torch's own; encoder and decoder of ViT-B and ViT-L."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mvd_kernels.attention import FLASH_ATTENTION_RELEASES, attention_backend, attention_backends
from mvd_kernels.bench.case import BenchmarkCase, clips, leaf
from mvd_kernels.native import attention as native
from mvd_kernels.reference.attention import attention


def cases(device: torch.device) -> Iterator[BenchmarkCase]:
    """Yield cases of 160 visible tokens (encoder) and of all 1568 tokens (decoder and teachers)."""
    count, dtype = clips(device), torch.bfloat16
    for model, heads in (("B", 12), ("L", 16)):
        for tokens in (160, 1568):
            qkv = leaf(count, tokens, 3, heads, 64, device=device, dtype=dtype)
            implementations: dict[str, Callable[[], Any]] = {"sdpa": partial(attention, qkv)}
            refused = attention_backends(device, dtype)
            for backend in FLASH_ATTENTION_RELEASES:
                if refused.get(backend.name) == "":
                    implementations[backend.name] = partial(backend.attend, qkv)
            if attention_backend(device, dtype) == "native":
                implementations["native"] = partial(native.attention, qkv, tokens)
            shape = f"{model}: B {count}, N {tokens}, H {heads}, K 64"
            flops = 4 * count * heads * tokens**2 * 64
            yield BenchmarkCase(shape, dtype, implementations, (qkv,), flops=flops)
