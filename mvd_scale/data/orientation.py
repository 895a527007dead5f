"""Orientation of frames: from the coded frame to the displayed one, as one of eight rotations and mirrorings.

A frame is mirrored left-right first (`mirrored`), and then rotated counterclockwise (`rotation`). Equivalently it is
transposed, for a rotation by 90 or 270 degrees, and then mirrored left-right and up-down (`mirror_axes`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Orientation(NamedTuple):
    """Way from a coded frame to the displayed one."""

    rotation: int = 0
    """Counterclockwise rotation in degrees, after the mirroring: 0, 90, 180 or 270."""

    mirrored: bool = False
    """Whether the coded frame is mirrored left-right first."""


_BY_AXES: dict[tuple[bool, bool, bool], Orientation] = {
    (False, False, False): Orientation(0),
    (False, True, True): Orientation(180),
    (False, True, False): Orientation(0, mirrored=True),
    (False, False, True): Orientation(180, mirrored=True),
    (True, False, True): Orientation(90),
    (True, True, False): Orientation(270),
    (True, False, False): Orientation(90, mirrored=True),
    (True, True, True): Orientation(270, mirrored=True),
}
"""Orientation by whether the frame is transposed, and then mirrored left-right and up-down."""

_AXES = {orientation: axes for axes, orientation in _BY_AXES.items()}

_EXIF: dict[int, Orientation] = {
    1: Orientation(0),
    2: Orientation(0, mirrored=True),
    3: Orientation(180),
    4: Orientation(180, mirrored=True),
    5: Orientation(90, mirrored=True),
    6: Orientation(270),
    7: Orientation(270, mirrored=True),
    8: Orientation(90),
}
"""Orientation by the value of the EXIF tag of that name."""


def mirror_axes(rotation: int, mirrored: bool) -> tuple[bool, bool]:
    """Whether to mirror a frame left-right and up-down, after transposing it for a rotation by 90 or 270 degrees."""
    _, left_right, up_down = _AXES[Orientation(rotation, bool(mirrored))]
    return left_right, up_down


def orientation_of_matrix(matrix: NDArray[np.int32]) -> Orientation | None:
    """Orientation of a display matrix, as containers state it: (x', y') = (a x + c y, b x + d y).

    Args:
        matrix: a b u, c d v, x y w in fixed point: int32 (9,).

    Returns:
        the orientation, whatever the scale; None if the matrix rotates by another angle than a multiple of 90 degrees.
    """
    entries = [int(matrix[place]) for place in (0, 1, 3, 4)]
    # Writers round sines and cosines to fixed point: an entry of less than a thousandth is a zero.
    a, b, c, d = (entry if 1000 * abs(entry) >= max(map(abs, entries)) else 0 for entry in entries)
    if not any((a, b, c, d)):
        return Orientation()  # an empty matrix states nothing
    if b == c == 0 and a and d:
        return _BY_AXES[False, a < 0, d < 0]
    if a == d == 0 and b and c:
        return _BY_AXES[True, c < 0, b < 0]
    return None


def orientation_of_exif(tag: int) -> Orientation:
    """Orientation of the EXIF tag of that name; values other than 1 to 8 state nothing."""
    return _EXIF.get(tag, Orientation())


def orient(picture: NDArray[np.uint8], rotation: int, mirrored: bool) -> NDArray[np.uint8]:
    """Coded picture, uint8 (H, W, 3), as it is displayed: a view, not a copy."""
    return np.rot90(picture[:, ::-1] if mirrored else picture, rotation // 90)
