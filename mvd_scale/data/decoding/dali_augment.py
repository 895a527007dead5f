"""Augmentations of a clip as DALI operators that reproduce PIL's; nothing random is drawn here.

Every operation treats all frames of a clip alike, except contrast, autocontrast and equalize, which use the statistics
of each frame, as PIL does.

Legend: T frames, S side, K operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from mvd_scale.data.sampling.augment import Operation

FILL = 128
"""Grey level of pixels that a warp takes from outside of the frame, as in the published code."""

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
"""PIL's smoothing filter: sharpness blends between the smoothed frame and the frame, and beyond."""


def apply_operation(clip: DataNode, operation: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    """Apply to each clip of a batch the operation that was drawn for it.

    Args:
        clip: uint8 (T, S, S, 3), layout FHWC.
        operation: a member of `Operation`, int32 scalar on the host.
        value: value of the operation, float32 (6,) on the host.
        on_gpu: whether the clip is on a GPU.

    Returns:
        uint8 (T, S, S, 3).
    """
    if operation == int(Operation.WARP):
        result = _warp(clip, value)
    elif operation == int(Operation.BRIGHTNESS):
        result = _brightness(clip, value, on_gpu)
    elif operation == int(Operation.CONTRAST):
        result = _contrast(clip, value, on_gpu)
    elif operation == int(Operation.SATURATION):
        result = _saturation(clip, value, on_gpu)
    elif operation == int(Operation.SHARPNESS):
        result = _sharpness(clip, value, on_gpu)
    elif operation == int(Operation.POSTERIZE):
        result = _posterize(clip, value, on_gpu)
    elif operation == int(Operation.SOLARIZE):
        result = _solarize(clip, value, on_gpu)
    elif operation == int(Operation.SOLARIZE_ADD):
        result = _solarize_add(clip, value, on_gpu)
    elif operation == int(Operation.AUTOCONTRAST):
        result = _autocontrast(clip)
    elif operation == int(Operation.EQUALIZE):
        result = _equalize(clip)
    elif operation == int(Operation.HUE):
        result = _hue(clip, value)
    else:
        result = _leave(clip)
    return result


@do_not_convert  # type: ignore[untyped-decorator]
def erase(clip: DataNode, box: DataNode, noise: DataNode, side: int, on_gpu: bool) -> DataNode:
    """Fill a box of every frame with noise.

    Args:
        clip: uint8 (T, S, S, 3).
        box: top, left, height and width in pixels, int32 (4,) on the host; height 0 for no box.
        noise: uint8 (T, height, width, 3) on the host.
        side: side of the frame (S) in pixels.
        on_gpu: whether the clip is on a GPU.

    Returns:
        uint8 (T, S, S, 3).
    """
    without = fn.erase(
        clip, anchor=fn.cast(box[0:2], dtype=types.FLOAT), shape=fn.cast(box[2:4], dtype=types.FLOAT), axis_names="HW"
    )
    patch = noise.gpu() if on_gpu else noise
    # DALI cannot paste into a clip. The slice below starts at negative offsets and is as large as the frame, so that it
    # places the noise on a black frame; the sum with the clip, whose box is black, fills the box.
    spread = fn.slice(
        patch, start=-box[0:2], shape=(side, side), axes=(1, 2), out_of_bounds_policy="pad", fill_values=0
    )
    return without + spread


def _of(value: DataNode, on_gpu: bool) -> DataNode:
    return value[0].gpu() if on_gpu else value[0]


def _blend(degenerate: Any, clip: DataNode, factor: DataNode) -> DataNode:
    """PIL's blend: factor 0 gives the degenerate picture, 1 the clip; above 1 it extrapolates beyond the clip."""
    return fn.cast(math.clamp(degenerate + factor * (clip - degenerate), 0.0, 255.0), dtype=types.UINT8)


@do_not_convert  # type: ignore[untyped-decorator]
def _warp(clip: DataNode, value: DataNode) -> DataNode:
    matrix = fn.reshape(value, shape=[2, 3])
    return fn.warp_affine(clip, matrix=matrix, fill_value=FILL, interp_type=types.INTERP_LINEAR)


@do_not_convert  # type: ignore[untyped-decorator]
def _brightness(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    return fn.cast(math.clamp(clip * _of(value, on_gpu), 0.0, 255.0), dtype=types.UINT8)


@do_not_convert  # type: ignore[untyped-decorator]
def _contrast(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    mean = fn.reductions.mean(_grey(clip), axes=(1, 2, 3), keep_dims=True)
    return _blend(math.floor(mean + 0.5), clip, _of(value, on_gpu))


@do_not_convert  # type: ignore[untyped-decorator]
def _saturation(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    return _blend(fn.cast(_grey(clip), dtype=types.FLOAT), clip, _of(value, on_gpu))


@do_not_convert  # type: ignore[untyped-decorator]
def _sharpness(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    smooth = fn.filter(clip, _SMOOTH, dtype=types.FLOAT)
    return _blend(smooth, clip, _of(value, on_gpu))


@do_not_convert  # type: ignore[untyped-decorator]
def _posterize(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    step = fn.cast(_of(value, on_gpu), dtype=types.INT32)
    return fn.cast(clip // step * step, dtype=types.UINT8)


@do_not_convert  # type: ignore[untyped-decorator]
def _solarize(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    inverted = fn.cast(clip >= _of(value, on_gpu), dtype=types.INT32)
    return fn.cast(clip + inverted * (255 - 2 * fn.cast(clip, dtype=types.INT32)), dtype=types.UINT8)


@do_not_convert  # type: ignore[untyped-decorator]
def _solarize_add(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    dark = fn.cast(clip < 128, dtype=types.INT32)
    return fn.cast(math.clamp(clip + dark * fn.cast(_of(value, on_gpu), dtype=types.INT32), 0, 255), dtype=types.UINT8)


@do_not_convert  # type: ignore[untyped-decorator]
def _autocontrast(clip: DataNode) -> DataNode:
    low = fn.cast(fn.reductions.min(clip, axes=(1, 2), keep_dims=True), dtype=types.FLOAT)
    high = fn.cast(fn.reductions.max(clip, axes=(1, 2), keep_dims=True), dtype=types.FLOAT)
    flat = fn.cast(high <= low, dtype=types.FLOAT)
    # A flat channel (high == low) must stay as it is: `flat` turns its scale into 1 and its offset into 0.
    scale = flat + (1.0 - flat) * 255.0 / (high - low + flat)
    stretched = math.floor((clip - low * (1.0 - flat)) * scale + 1e-3)
    return fn.cast(stretched, dtype=types.UINT8)


@do_not_convert  # type: ignore[untyped-decorator]
def _equalize(clip: DataNode) -> DataNode:
    return fn.equalize(clip)


@do_not_convert  # type: ignore[untyped-decorator]
def _hue(clip: DataNode, value: DataNode) -> DataNode:
    return fn.hue(clip, hue=value[0])


@do_not_convert  # type: ignore[untyped-decorator]
def _leave(clip: DataNode) -> DataNode:
    return fn.copy(clip)


def _grey(clip: DataNode) -> DataNode:
    return fn.color_space_conversion(clip, image_type=types.RGB, output_type=types.GRAY)
