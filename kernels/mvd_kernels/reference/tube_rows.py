"""`tube_rows` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mvd_kernels.reference.tubes import gather_tubes
from mvd_kernels.tubes import max_pixel_value


@lru_cache
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], white: float, pixels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factor and summand of each value of a row, both float32 (t p p 3,).

    Cached, because a copy to the GPU at every call would make the host wait for the device.
    """
    scale = [1 / (white * s) for s in std] * pixels
    shift = [-m / s for m, s in zip(mean, std, strict=True)] * pixels
    with torch.inference_mode(False):
        return torch.tensor(scale, device=device), torch.tensor(shift, device=device)


def tube_rows(
    pixels: Tensor,
    tokens: Tensor | None,
    *,
    tubelet: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """See `mvd_kernels.tube_rows`."""
    tubes = gather_tubes(pixels, tokens, tubelet, patch).flatten(2)
    # (x / white - mean) / std is computed as one multiply-add per value.
    # During torch.export new tensors are fake tensors without values, which must not enter the cache.
    affine = _affine.__wrapped__ if torch.compiler.is_exporting() else _affine
    values = (tuple(mean), tuple(std), max_pixel_value(pixels), tubes.shape[-1] // 3)
    scale, shift = affine(*values, pixels.device)
    return torch.addcmul(shift, tubes.to(torch.float32), scale).to(dtype)
