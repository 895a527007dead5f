"""Helpers of the operators on tubes: the token grid, and ImageNet's colour statistics.

Legend: B clips, T frames, H W pixels, t frames of a tubelet, p side of a patch.
Tokens are numbered time-major: (t, h, w).
"""

from __future__ import annotations

from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def token_grid(pixels: Tensor, tubelet: int, patch: int) -> tuple[int, int, int]:
    """Number of tokens of clips (B, T, H, W, 3) along time, height and width.

    Raises:
        ValueError: the clips have not 3 colour channels, or their size is no multiple of the size of the tubes.
    """
    _, frames, height, width, channels = pixels.shape
    if channels != 3 or frames % tubelet or height % patch or width % patch:
        raise ValueError(
            f"clips of shape {tuple(pixels.shape)}: expected (clips, frames, height, width, 3) "
            f"divisible into tubes of {tubelet} x {patch} x {patch}"
        )
    return frames // tubelet, height // patch, width // patch


def max_pixel_value(pixels: Tensor) -> float:
    """Value of full brightness: 255 for integer pixels, 1 for floating pixels."""
    return 1.0 if pixels.is_floating_point() else 255.0
