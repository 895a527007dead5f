"""Frames that say their number: eight squares, four across and two down, row by row, the lowest bit first.

A square is light for 1 and dark for 0. The middle half of each square is read, and its mean compared with 128.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LIGHT, DARK = 235, 20


def read_barcode(picture: NDArray[np.uint8]) -> int:
    """Number that a frame shows: uint8 (H, W) or (H, W, 3)."""
    grey = picture.mean(-1) if picture.ndim == 3 else picture
    height, width = grey.shape[0] // 2, grey.shape[1] // 4
    number = 0
    for bit in range(8):
        row, column = divmod(bit, 4)
        square = grey[
            row * height + height // 4 : row * height + height - height // 4,
            column * width + width // 4 : column * width + width - width // 4,
        ]
        number |= int(square.mean() > 128) << bit
    return number


def read_barcodes(pictures: NDArray[np.uint8]) -> list[int]:
    """Numbers that frames show: uint8 (T, H, W, 3)."""
    return [read_barcode(picture) for picture in pictures]


def draw_barcode(number: int, side: int = 64) -> NDArray[np.uint8]:
    """Frame that shows a number: uint8 (side, side, 3)."""
    bits = np.array([number >> bit & 1 for bit in range(8)]).reshape(2, 4)
    grey = np.where(bits, LIGHT, DARK).astype(np.uint8).repeat(side // 2, 0).repeat(side // 4, 1)
    return np.repeat(grey[..., None], 3, axis=-1)
