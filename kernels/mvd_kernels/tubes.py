"""What the operators on tubes share: the grid of tokens and ImageNet's colours.

Legend: B clips, T frames, H W pixels, t frames of a tubelet, p side of a patch.
Tokens are numbered time-major: (t, h, w).
"""

from __future__ import annotations

from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def token_grid(pixels: Tensor, tubelet: int, patch: int) -> tuple[int, int, int]:
    """Tokens of clips (B, T, H, W, 3) along time, height and width.

    Raises:
        ValueError: the clips are not in colour, or tubes of this size do not fill them.
    """
    _, frames, height, width, channels = pixels.shape
    if channels != 3 or frames % tubelet or height % patch or width % patch:
        raise ValueError(
            f"clips of shape {tuple(pixels.shape)} are not (clips, frames, height, width, 3) "
            f"in tubes of {tubelet} x {patch} x {patch}"
        )
    return frames // tubelet, height // patch, width // patch


def white_level(pixels: Tensor) -> float:
    """What full brightness is: 255 for integers, 1 for floating pixels."""
    return 1.0 if pixels.is_floating_point() else 255.0
