"""From decoded frames to the rows of the patch embedding, for chosen tokens only.

Legend: B clips, T frames, H W pixels, K chosen tokens, t frames of a tubelet, p side of a patch.
Tokens are numbered time-major: (t, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def _gather(pixels: Tensor, tokens: Tensor | None, tubelet: int, patch: int) -> Tensor:
    """Tubes as (B, K, t, p, p, 3) in the dtype of `pixels`; only chosen pixels are touched."""
    clips, frames, height, width, channels = pixels.shape
    time, rows, columns = frames // tubelet, height // patch, width // patch
    tubes = pixels.view(clips, time, tubelet, rows, patch, columns, patch, channels)
    if tokens is None:
        return tubes.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(clips, -1, tubelet, patch, patch, channels)
    clip = torch.arange(clips, device=pixels.device).unsqueeze(1)
    return tubes[
        clip,
        tokens.div(rows * columns, rounding_mode="floor"),
        :,
        tokens.div(columns, rounding_mode="floor") % rows,
        :,
        tokens % columns,
    ]


@lru_cache
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], white: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factor and summand of each channel. Kept: copying them to a GPU at every call would make the host wait."""
    scale = [1 / (white * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
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
    """Normalised tubes as rows of the patch embedding.

    Args:
        pixels: (B, T, H, W, 3), uint8 in 0..255 or floating in 0..1.
        tokens: int64 (B, K), or None for all tokens in order.
        tubelet: t.
        patch: p.
        mean: of each colour channel, on the 0..1 scale.
        std: likewise.
        dtype: floating dtype of the result.

    Returns:
        (B, K, 3 * t * p * p), flattened as (channel, frame, row, column): the order of a 3-D convolution's weight.
    """
    tubes = _gather(pixels, tokens, tubelet, patch)
    white = 1.0 if tubes.is_floating_point() else 255.0
    # (x / white - mean) / std as one multiply-add per channel.
    # While a program is exported, new tensors are stand-ins without values: none of them may stay in the cache.
    affine = _affine.__wrapped__ if torch.compiler.is_exporting() else _affine
    scale, shift = affine(tuple(mean), tuple(std), white, pixels.device)
    rows = torch.addcmul(shift, tubes.to(torch.float32), scale)
    return rows.permute(0, 1, 5, 2, 3, 4).flatten(2).to(dtype)


def tube_pixels(pixels: Tensor, tokens: Tensor | None, *, tubelet: int, patch: int) -> Tensor:
    """Raw tubes on the 0..1 scale, as pixel targets see them.

    Args:
        pixels: (B, T, H, W, 3), uint8 in 0..255 or floating in 0..1.
        tokens: int64 (B, K), or None for all tokens in order.
        tubelet: t.
        patch: p.

    Returns:
        float32 (B, K, t * p * p, 3), flattened as (frame, row, column).
    """
    tubes = _gather(pixels, tokens, tubelet, patch)
    white = 1.0 if tubes.is_floating_point() else 255.0
    return tubes.flatten(2, 4).to(torch.float32) / white
