"""Conversion of decoded frames to rows of the patch embedding, for chosen tokens only.

Legend: B clips, T frames, H W pixels, K chosen tokens, t frames of a tubelet, p side of a patch.
Tokens are numbered time-major: (t, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvd_kernels.dispatch import uses_triton
from mvd_kernels.reference.tube_rows import tube_rows as reference
from mvd_kernels.tubes import token_grid


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
    """Extract normalised tubes as rows of the patch embedding; pixels of other tubes are not read.

    Args:
        pixels: (B, T, H, W, 3), uint8 in 0..255 or floating in 0..1. No gradient flows here.
        tokens: int64 (B, K), or None for all tokens in order.
        tubelet: frames of a tube, t.
        patch: side of a tube in pixels, p.
        mean: mean of each colour channel, on the 0..1 scale.
        std: standard deviation of each colour channel, on the 0..1 scale.
        dtype: floating dtype of the result.

    Returns:
        (B, K, t * p * p * 3), flattened as (frame, row, column, channel): the order of the pixels in memory, in which
        the front frame of a tube is the first p * p * 3 values of its row.

    Raises:
        ValueError: the size of the clips is no multiple of the size of the tubes.
    """
    token_grid(pixels, tubelet, patch)
    if uses_triton(pixels):
        from mvd_kernels.triton_ops.tube_rows import tube_rows as fused

        return fused(pixels, tokens, tubelet=tubelet, patch=patch, mean=mean, std=std, dtype=dtype)
    return reference(pixels, tokens, tubelet=tubelet, patch=patch, mean=mean, std=std, dtype=dtype)
