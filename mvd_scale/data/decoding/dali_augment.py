"""Augmentations of a clip as nodes of the DALI graph; nothing random is drawn here.

RandAugment runs on the regions of `sampling.regions`: on CPUs by `frame_operations` as a Python function, on GPUs by
DALI's operators, which take frames on the host too (tests). DALI's differ from PIL's by rounding, and warps interpolate
bilinearly: DALI has no bicubic warp. Every operation treats all frames of a clip alike, except contrast, autocontrast
and equalize, which use the statistics of each frame, as PIL does.

Legend: T frames, H W pixels, S side, C copies, K operations.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from mvd_scale.config.data import ColorJitter
from mvd_scale.data.decoding.bicubic_warp import FILL
from mvd_scale.data.decoding.dali_geometry import Sample
from mvd_scale.data.decoding.frame_operations import apply_operations
from mvd_scale.data.sampling.augment import Operation

_WHITE = np.uint8(255)

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
"""PIL's smoothing filter: sharpness blends between the smoothed frame and the frame, and beyond."""


@do_not_convert  # type: ignore[untyped-decorator]
def rand_augment_on_host(sample: Sample, frames: DataNode, *, copy: int, pool: Executor) -> DataNode:
    """Apply the operations that were drawn for a copy of a clip on the CPU: uint8 (T, height, width, 3) of its crop.

    Args:
        sample: arrays of the sample: `operations`, `values` and `regions`.
        frames: uint8 (T, H, W, 3), in coded orientation.
        copy: index of the copy of the sample.
        pool: executor that works on several frames at once.
    """
    return fn.python_function(
        frames,
        *(sample[name][copy] for name in ("operations", "values", "regions")),
        function=partial(apply_operations, pool=pool),
        num_outputs=1,
        output_layouts="FHWC",
    )


def rand_augment_by_dali(sample: Sample, frames: DataNode, *, copy: int, operations: int, on_gpu: bool) -> DataNode:
    """Apply the operations that were drawn for a copy of a clip by DALI: uint8 (T, height, width, 3) of its crop.

    Args:
        sample: arrays of the sample: `operations`, `values` and `regions`.
        frames: uint8 (T, H, W, 3), in coded orientation.
        copy: index of the copy of the sample.
        operations: number of operations (K).
        on_gpu: whether the frames are on a GPU.
    """
    regions = sample["regions"][copy]
    clip = _cut(frames, regions[0], None)
    for k in range(operations):
        value = fn.cast(sample["values"][copy, k], dtype=types.FLOAT)
        clip = _apply_operation(clip, sample["operations"][copy, k], value, regions[k], regions[k + 1], on_gpu)
    return clip


def _apply_operation(
    clip: DataNode, operation: DataNode, value: DataNode, before: DataNode, after: DataNode, on_gpu: bool
) -> DataNode:
    """Apply to each clip of a batch the operation that was drawn for it, and cut the result to its region.

    Args:
        clip: uint8 (T, H, W, 3), layout FHWC.
        operation: a member of `Operation`, int32 scalar on the host.
        value: value of the operation, float32 (6,) on the host.
        before: top, left, height and width of the region that `clip` shows, int32 (4,) on the host.
        after: those of the region that the result shows.
        on_gpu: whether the clip is on a GPU.

    Returns:
        uint8 (T, height, width, 3).
    """
    if operation == int(Operation.WARP):
        result = _warp(clip, value, after)
    elif operation == int(Operation.BRIGHTNESS):
        result = _brightness(clip, value, on_gpu)
    elif operation == int(Operation.CONTRAST):
        result = _cut(_contrast(clip, value, on_gpu), after, before)
    elif operation == int(Operation.SATURATION):
        result = _saturation(clip, value, on_gpu)
    elif operation == int(Operation.SHARPNESS):
        result = _cut(_sharpness(clip, value, before, on_gpu), after, before)
    elif operation == int(Operation.POSTERIZE):
        result = _posterize(clip, value, on_gpu)
    elif operation == int(Operation.SOLARIZE):
        result = _solarize(clip, value, on_gpu)
    elif operation == int(Operation.SOLARIZE_ADD):
        result = _solarize_add(clip, value, on_gpu)
    elif operation == int(Operation.AUTOCONTRAST):
        result = _cut(_autocontrast(clip), after, before)
    elif operation == int(Operation.EQUALIZE):
        result = _cut(_equalize(clip), after, before)
    else:
        result = _leave(clip)
    return result


@do_not_convert  # type: ignore[untyped-decorator]
def color_jitter(clip: DataNode, values: DataNode, jitter: ColorJitter, on_gpu: bool) -> DataNode:
    """Change brightness, contrast, saturation and hue of the resized crop.

    Args:
        clip: uint8 (T, S, S, 3).
        values: three factors, and the rotation of the hue in degrees if `jitter` has one: float32 (J,) on the host.
        jitter: rules by which the values were drawn.
        on_gpu: whether the clip is on a GPU.

    Returns:
        uint8 (T, S, S, 3).
    """
    for number, function in enumerate((_brightness, _contrast, _saturation)):
        clip = function(clip, values[number : number + 1], on_gpu)
    return fn.hue(clip, hue=values[3]) if jitter.hue else clip


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
    return _truncate(degenerate + factor * (clip - degenerate))


def _truncate(clip: DataNode) -> DataNode:
    """Round levels down, as PIL does; the small addend makes up for errors of float32 below a whole number."""
    return fn.cast(math.clamp(math.floor(clip + 1e-3), 0.0, 255.0), dtype=types.UINT8)


@do_not_convert  # type: ignore[untyped-decorator]
def _cut(clip: DataNode, region: DataNode, shown: DataNode | None) -> DataNode:
    """Cut a region out of a clip that shows another one, or the media if it is None."""
    start = region[0:2] if shown is None else region[0:2] - shown[0:2]
    return fn.slice(clip, start=start, shape=region[2:4], axes=(1, 2))


@do_not_convert  # type: ignore[untyped-decorator]
def _warp(clip: DataNode, value: DataNode, after: DataNode) -> DataNode:
    matrix, size = fn.reshape(value, shape=[2, 3]), fn.cast(after[2:4], dtype=types.FLOAT)
    # Without a fill value, positions between the middle of a border pixel and the border get that pixel, as in PIL.
    warped = fn.warp_affine(clip, matrix=matrix, size=size, interp_type=types.INTERP_LINEAR, dtype=types.FLOAT)
    black = clip[0:1] ^ clip[0:1]
    grey = fn.warp_affine(black, matrix=matrix, size=size, fill_value=FILL, interp_type=types.INTERP_NN)
    return _truncate(warped * (grey == 0) + grey)


@do_not_convert  # type: ignore[untyped-decorator]
def _brightness(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    return _truncate(clip * _of(value, on_gpu))


@do_not_convert  # type: ignore[untyped-decorator]
def _contrast(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    mean = fn.reductions.mean(_grey(clip), axes=(1, 2, 3), keep_dims=True)
    return _blend(math.floor(mean + 0.5), clip, _of(value, on_gpu))


@do_not_convert  # type: ignore[untyped-decorator]
def _saturation(clip: DataNode, value: DataNode, on_gpu: bool) -> DataNode:
    return _blend(fn.cast(_grey(clip), dtype=types.FLOAT), clip, _of(value, on_gpu))


@do_not_convert  # type: ignore[untyped-decorator]
def _sharpness(clip: DataNode, value: DataNode, region: DataNode, on_gpu: bool) -> DataNode:
    smooth = fn.filter(clip, _SMOOTH, dtype=types.UINT8)
    sharp = _blend(fn.cast(smooth, dtype=types.FLOAT), clip, _of(value, on_gpu))
    # PIL's filter leaves the border of the frame as it is: `inner` is 1 but on the border.
    inside = fn.slice(clip[0:1], start=[1, 1], shape=region[2:4] - 2, axes=(1, 2))
    inner = fn.slice(
        fn.cast(inside >= 0, dtype=types.UINT8),
        start=[-1, -1],
        shape=region[2:4],
        axes=(1, 2),
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    return sharp * inner + clip * (inner == 0)


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
    return _truncate((clip - low * (1.0 - flat)) * scale)


@do_not_convert  # type: ignore[untyped-decorator]
def _equalize(clip: DataNode) -> DataNode:
    # DALI counts the pixels up to a level, PIL those below it: of the inverted clip these are the same.
    return fn.equalize(clip ^ _WHITE) ^ _WHITE


@do_not_convert  # type: ignore[untyped-decorator]
def _leave(clip: DataNode) -> DataNode:
    return fn.copy(clip)


def _grey(clip: DataNode) -> DataNode:
    return fn.color_space_conversion(clip, image_type=types.RGB, output_type=types.GRAY)
