"""Regions of a frame that the operations of RandAugment need, so that only these are copied and computed.

The published code applies the operations to whole frames and cuts the crop out of the result. The same pixels come from
less work: walk the list of operations backwards from the crop, and ask for each one which part of its input the wanted
part of its output depends on.

Legend: K operations.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.orientation import Orientation, mirror_axes
from mvd_scale.data.sampling.augment import Operation
from mvd_scale.data.sampling.crops import Box

STATISTICS = frozenset({Operation.CONTRAST, Operation.AUTOCONTRAST, Operation.EQUALIZE})
"""Operations that depend on every pixel of the frame."""


def plan_regions(
    operations: NDArray[np.int32], values: NDArray[np.float64], box: Box, size: tuple[int, int]
) -> NDArray[np.int32]:
    """Compute the region of the frame that each operation reads, and the box that remains in the end.

    Args:
        operations: members of `Operation`, int32 (K,).
        values: their values, float64 (K, 6).
        box: region that is wanted after the last operation.
        size: height and width of the frame in pixels.

    Returns:
        top, left, height and width in pixels, int32 (K + 1, 4): operation k reads region k and gives region k + 1.
    """
    regions = [box]
    for operation, value in zip(operations[::-1].tolist(), values[::-1], strict=True):
        regions.append(_input_region(Operation(operation), value, regions[-1], size))
    return np.array(regions[::-1], dtype=np.int32)


def localize_warps(
    operations: NDArray[np.int32], values: NDArray[np.float64], regions: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Rewrite matrices of warps from positions in the frame to positions in the regions that they read and give.

    Args:
        operations: members of `Operation`, int32 (K,).
        values: their values, float64 (K, 6).
        regions: see `plan_regions`, int32 (K + 1, 4).

    Returns:
        float64 (K, 6).
    """
    local = values.copy()
    for k in np.flatnonzero(operations == Operation.WARP):
        (top_in, left_in), (top, left) = regions[k, :2], regions[k + 1, :2]
        x_axis, y_axis = values[k, :3], values[k, 3:]
        local[k, 2] += x_axis[0] * left + x_axis[1] * top - left_in
        local[k, 5] += y_axis[0] * left + y_axis[1] * top - top_in
    return local


def orient_warps(
    operations: NDArray[np.int32], values: NDArray[np.float64], size: tuple[int, int], orientation: Orientation
) -> NDArray[np.float64]:
    """Rewrite matrices of warps from displayed frames to coded ones.

    Args:
        operations: members of `Operation`, int32 (K,).
        values: their values, float64 (K, 6).
        size: height and width of the displayed frame in pixels.
        orientation: way from the coded frame to the displayed one.

    Returns:
        float64 (K, 6).
    """
    height, width = size
    left_right, up_down = mirror_axes(*orientation)
    # Displayed positions (x, y, 1) to coded ones.
    x = np.array([-1.0, 0, width] if left_right else [1.0, 0, 0])
    y = np.array([0, -1.0, height] if up_down else [0, 1.0, 0])
    to_coded = np.stack([y, x, [0, 0, 1]] if orientation.rotation % 180 else [x, y, [0, 0, 1]])
    turned = values.copy()
    for k in np.flatnonzero(operations == Operation.WARP):
        displayed = np.vstack([values[k].reshape(2, 3), [0, 0, 1]])
        turned[k] = (to_coded @ displayed @ np.linalg.inv(to_coded))[:2].ravel()
    return turned


def _input_region(operation: Operation, value: NDArray[np.float64], box: Box, size: tuple[int, int]) -> Box:
    """Compute the region that an operation reads to give a box."""
    if operation in STATISTICS:
        return 0, 0, *size
    top, left, height, width = box
    if operation == Operation.SHARPNESS:
        return _clip((top - 1, top + height + 1), (left - 1, left + width + 1), size)
    if operation == Operation.WARP:
        x, y = (_bicubic_span(axis, box) for axis in (value[:3], value[3:]))
        return _clip(y, x, size)
    return box


def _bicubic_span(axis: NDArray[np.float64], box: Box) -> tuple[int, int]:
    """First pixel, and pixel after the last one, that a bicubic warp reads along an axis of the input for a box."""
    top, left, height, width = box
    # The extremes lie at the middles of the corner pixels.
    corners = [
        axis[0] * x + axis[1] * y + axis[2]
        for x in (left + 0.5, left + width - 0.5)
        for y in (top + 0.5, top + height - 0.5)
    ]
    # The kernel has two pixels on either side of a position.
    return math.floor(min(corners) - 0.5) - 1, math.floor(max(corners) - 0.5) + 3


def _clip(rows: tuple[int, int], columns: tuple[int, int], size: tuple[int, int]) -> Box:
    """Clip a region to the frame; one that lies outside becomes the nearest row or column of the frame."""
    (top, height), (left, width) = (
        _clip_span(span, length) for span, length in zip((rows, columns), size, strict=True)
    )
    return top, left, height, width


def _clip_span(span: tuple[int, int], length: int) -> tuple[int, int]:
    first = min(max(span[0], 0), length - 1)
    return first, max(min(span[1], length), first + 1) - first
