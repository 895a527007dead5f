"""Affine warps of frames with bicubic interpolation, with the pixels of PIL's `Image.transform`.

PIL takes 50 ns for a pixel, whatever the matrix. Shears and translations move each row, or each column, by one
distance: four weights for a line, instead of sixteen for each pixel, take a third of that time.

Legend: H W pixels of the input, N lines, L pixels of a line.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FILL = 128
"""Grey level of pixels that a warp takes from outside of the frame, as in the published code."""

Frame = NDArray[np.uint8]
"""One frame: uint8 (H, W, 3)."""


def warp_function(
    matrix: NDArray[np.float64], frame_size: tuple[int, int], size: tuple[int, int]
) -> Callable[[Frame], Frame]:
    """Prepare a warp that is applied to many frames.

    Args:
        matrix: six numbers that map positions (x, y, 1) in the output to positions in the input, float64 (6,).
        frame_size: height and width of the input in pixels.
        size: height and width of the output in pixels.

    Returns:
        function from a frame, uint8 (H, W, 3), to the warped one, uint8 (height, width, 3).
    """
    (a, b, c, d, e, f), (height, width) = matrix.tolist(), size
    # Lines beyond the border, which a translation by whole pixels asks for, are left to PIL.
    if (a, d, e) == (1, 0, 1) and f == int(f) and 0 <= f <= frame_size[0] - height:
        return _Shift(c + b * (np.arange(height) + 0.5), int(f), width, frame_size, axis=1)
    if (a, b, e) == (1, 0, 1) and c == int(c) and 0 <= c <= frame_size[1] - width:
        return _Shift(f + d * (np.arange(width) + 0.5), int(c), height, frame_size, axis=0)

    def by_pil(frame: Frame) -> Frame:
        picture = Image.fromarray(frame).transform(
            (width, height), Image.Transform.AFFINE, matrix.tolist(), Image.Resampling.BICUBIC, fillcolor=(FILL,) * 3
        )
        return np.asarray(picture)

    return by_pil


_BLOCK = 32
"""Lines that a shift computes at once."""


class _Shift:
    """Warp that moves each line, a row or a column of the output, by its own distance along the line.

    Args:
        distances: position in a line of the input less that in the line of the output, in pixels: float64 (N,).
        first: number of the line of the input that belongs to the first line of the output.
        length: pixels of a line of the output (L).
        frame_size: height and width of the input in pixels.
        axis: axis along which lines run: 1 for rows, 0 for columns.
    """

    def __init__(
        self, distances: NDArray[np.float64], first: int, length: int, frame_size: tuple[int, int], *, axis: int
    ) -> None:
        self.axis = axis
        whole = np.floor(distances)
        # The kernel reaches from one pixel before the position to two pixels behind it; border pixels are repeated.
        places = whole.astype(np.int64)[:, None] + np.arange(-1, length + 2)
        places = places.clip(0, frame_size[axis] - 1)
        lines = (first + np.arange(len(distances)))[:, None]
        self.index = lines * frame_size[1] + places if axis else places * frame_size[1] + lines
        positions = distances[:, None] + (np.arange(length) + 0.5)
        self.outside = (positions < 0) | (positions >= frame_size[axis])
        self.share = (distances - whole)[:, None, None]

    def __call__(self, frame: Frame) -> Frame:
        pixels = np.ascontiguousarray(frame).reshape(-1).view("V3")
        count, length = self.outside.shape
        warped = np.empty((count, length, 3), np.uint8)
        # Blocks of lines stay in the processor's cache.
        for start in range(0, count, _BLOCK):
            block = slice(start, start + _BLOCK)
            taps = np.take(pixels, self.index[block]).view(np.uint8).reshape(-1, length + 3, 3).astype(np.float64)
            warped[block] = _cubic(taps, self.share[block]).clip(0, 255)
        warped[self.outside] = FILL
        return warped if self.axis else warped.swapaxes(0, 1)


def _cubic(taps: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate between the second and the third of four successive pixels, in PIL's order of operations.

    Args:
        taps: levels, float64 (N, L + 3, 3).
        share: distance from the second pixel of each line, 0 to 1: float64 (N, 1, 1).

    Returns:
        float64 (N, L, 3).
    """
    steps = taps[:, 1:] - taps[:, :-1]
    first, middle, last = steps[:, :-2], steps[:, 1:-1], steps[:, 2:]
    # The coefficients are whole numbers, so that they are exact in any order.
    outer = first + last
    levels = share * outer
    levels -= first
    levels -= outer
    levels *= share
    levels += first
    levels += middle
    levels *= share
    levels += taps[:, 1:-2]
    return levels
