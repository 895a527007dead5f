"""Conversion of decoded frames to the targets of pixel decoders, for chosen tokens only.

Legend: B clips, T frames, H W pixels, K chosen tokens, t frames of a tubelet, p side of a patch.
Tokens are numbered time-major: (t, h, w).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mvd_kernels.dispatch import uses_triton
from mvd_kernels.reference.tube_targets import tube_targets as reference
from mvd_kernels.tubes import token_grid

Normalize = Literal["none", "channel", "patch"]


def tube_targets(
    pixels: Tensor, tokens: Tensor | None, *, tubelet: int, patch: int, normalize: Normalize = "none"
) -> Tensor:
    """Extract the pixels of chosen tubes, normalised by statistics of each tube, which are computed in the same pass.

    `channel` (VideoMAE): each colour of a tube by its own mean and unbiased deviation (plus 1e-6). `patch` (MAE): the
    colours are first normalised by ImageNet's statistics, then all values of a tube by their common mean and unbiased
    variance (plus 1e-6). `none`: pixels on the 0..1 scale.

    Args:
        pixels: (B, T, H, W, 3), uint8 in 0..255 or floating in 0..1. No gradient flows here.
        tokens: int64 (B, K), or None for all tokens in order.
        tubelet: frames of a tube, t.
        patch: side of a tube in pixels, p.
        normalize: `none`, `channel` or `patch`.

    Returns:
        float32 (B, K, t * p * p * 3), flattened as (frame, row, column, channel).

    Raises:
        ValueError: the size of the clips is no multiple of the size of the tubes.
    """
    token_grid(pixels, tubelet, patch)
    if uses_triton(pixels):
        from mvd_kernels.triton_ops.tube_targets import tube_targets as fused

        return fused(pixels, tokens, tubelet=tubelet, patch=patch, normalize=normalize)
    return reference(pixels, tokens, tubelet=tubelet, patch=patch, normalize=normalize)


def tube_pixels(pixels: Tensor, tokens: Tensor | None, *, tubelet: int, patch: int) -> Tensor:
    """Extract tubes on the 0..1 scale: `tube_targets` without normalisation, with a separate axis for the colours.

    Returns:
        float32 (B, K, t * p * p, 3), flattened as (frame, row, column).
    """
    return tube_targets(pixels, tokens, tubelet=tubelet, patch=patch).unflatten(-1, (-1, 3))
