"""Operations of RandAugment on the CPU, by PIL and by tables of levels; nothing random is drawn here.

The pixels are those of PIL's operations on whole frames. Only the regions of `sampling.regions` are computed.
Operations that map each level to another one become tables, and successive tables one table, which is looked up once.

Legend: T frames, H W pixels, K operations.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from mvd_scale.data.decoding.bicubic_warp import warp_function
from mvd_scale.data.sampling.augment import Operation
from mvd_scale.data.sampling.regions import STATISTICS

Clip = NDArray[np.uint8]
"""Frames: uint8 (T, H, W, 3)."""

Tables = NDArray[np.uint8]
"""Level for each level: uint8 (256,) for all frames and channels, or (T, 3, 256)."""

_LEVELS = np.arange(256, dtype=np.float32)
_IDENTITY = np.arange(256, dtype=np.uint8)


def apply_operations(
    frames: Clip,
    operations: NDArray[np.int32],
    values: NDArray[np.float64],
    regions: NDArray[np.int32],
    *,
    pool: Executor,
) -> Clip:
    """Apply the operations that were drawn for a clip, one after the other.

    Args:
        frames: uint8 (T, H, W, 3); they contain the first region.
        operations: members of `Operation`, int32 (K,).
        values: their values, with matrices of warps for positions in the regions, float64 (K, 6).
        regions: top, left, height and width in `frames` of the region that each operation reads; the last one is the
            box that remains: int32 (K + 1, 4).
        pool: executor that works on several frames at once.

    Returns:
        uint8 (T, height, width, 3) of the last region.

    Raises:
        ValueError: the first region reaches out of the frames: they are smaller than the manifest says.
    """
    check_box(frames.shape, tuple(regions[0].tolist()))
    clip = _cut(frames, np.zeros(2, np.int32), regions[0])
    tables: Tables | None = None
    for code, value, before, after in zip(operations.tolist(), values, regions[:-1], regions[1:], strict=True):
        operation = Operation(code)
        if operation == Operation.NONE:
            continue
        if operation in STATISTICS:
            clip = look_up(clip, tables, pool)
            tables = _statistics_tables(operation, clip, float(value[0]), pool)
            clip = _cut(clip, before[:2], after)
        elif operation == Operation.WARP:
            warp = warp_function(value, (int(before[2]), int(before[3])), (int(after[2]), int(after[3])))
            clip, tables = np.stack(list(pool.map(warp, look_up(clip, tables, pool)))), None
        elif operation in _ENHANCERS:
            enhance = partial(_enhance, _ENHANCERS[operation], float(value[0]))
            clip, tables = np.stack(list(pool.map(enhance, look_up(clip, tables, pool)))), None
            clip = _cut(clip, before[:2], after)
        else:
            table = level_table(operation, float(value[0]))
            tables = table if tables is None else table[tables]
    return look_up(clip, tables, pool)


def check_box(shape: tuple[int, ...], box: tuple[int, int, int, int]) -> None:
    """Check that frames of `shape` (T, H, W, 3) contain a box.

    Raises:
        ValueError: they do not.
    """
    top, left, height, width = box
    if top + height > shape[1] or left + width > shape[2]:
        raise ValueError(
            f"frames of {shape[1]} x {shape[2]} pixels do not contain the box {top, left, height, width} (top, left, "
            "height, width): the manifest states another size. Index the videos again"
        )


def level_table(operation: Operation, value: float) -> Tables:
    """Table of an operation that maps each level to another one, in every frame alike: uint8 (256,)."""
    levels = _LEVELS.astype(np.int64)
    if operation == Operation.BRIGHTNESS:
        return _blend(np.float32(0), value)
    if operation == Operation.POSTERIZE:
        return (levels // int(value) * int(value)).astype(np.uint8)
    if operation == Operation.SOLARIZE:
        return np.where(levels < value, levels, 255 - levels).astype(np.uint8)
    if operation == Operation.SOLARIZE_ADD:
        return np.where(levels < 128, np.minimum(levels + int(value), 255), levels).astype(np.uint8)
    raise ValueError(operation)


def look_up(clip: Clip, tables: Tables | None, pool: Executor) -> Clip:
    """Replace the levels of a clip by those of the tables; None leaves it as it is."""
    if tables is None:
        return clip
    each = np.broadcast_to(tables, (len(clip), 3, 256)).reshape(len(clip), 768)
    return np.stack(list(pool.map(_look_up, clip, each)))


def _look_up(frame: NDArray[np.uint8], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(frame).point(table.tolist()))


def _blend(degenerate: NDArray[np.float32] | np.float32, factor: float) -> Tables:
    """PIL's blend of a grey with each level: factor 0 gives the grey, 1 the level; above 1 it extrapolates."""
    return (degenerate + np.float32(factor) * (_LEVELS - degenerate)).clip(0, 255).astype(np.uint8)


def _statistics_tables(operation: Operation, clip: Clip, value: float, pool: Executor) -> Tables:
    """Tables of an operation that depend on the whole frame: uint8 (T, 3, 256)."""
    if operation == Operation.CONTRAST:
        return np.stack(list(pool.map(lambda frame: _contrast(frame, value), clip)))
    rule = _equalize if operation == Operation.EQUALIZE else _autocontrast
    return np.stack(list(pool.map(lambda frame: np.stack([rule(counts) for counts in _histograms(frame)]), clip)))


def _histograms(frame: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count the levels of each channel: (3, 256)."""
    return np.array(Image.fromarray(frame).histogram()).reshape(3, 256)


def _contrast(frame: NDArray[np.uint8], factor: float) -> Tables:
    counts = np.array(Image.fromarray(frame).convert("L").histogram())
    mean = int(float(counts @ np.arange(256)) / int(counts.sum()) + 0.5)
    return np.broadcast_to(_blend(np.float32(mean), factor), (3, 256))


def _autocontrast(counts: NDArray[np.int64]) -> Tables:
    """Stretch the levels that occur over the whole range."""
    low, high = np.flatnonzero(counts)[[0, -1]].tolist()
    if high <= low:
        return _IDENTITY
    scale = 255.0 / (high - low)
    return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)


def _equalize(counts: NDArray[np.int64]) -> Tables:
    """Spread the levels so that they occur about equally often."""
    present = counts[counts > 0]
    step = int(present[:-1].sum()) // 255
    if not step:
        return _IDENTITY
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.minimum((step // 2 + below) // step, 255).astype(np.uint8)


_ENHANCERS = {Operation.SATURATION: ImageEnhance.Color, Operation.SHARPNESS: ImageEnhance.Sharpness}


def _enhance(
    enhancer: Callable[[Image.Image], ImageEnhance._Enhance], factor: float, frame: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    return np.asarray(enhancer(Image.fromarray(frame)).enhance(factor))


def _cut(clip: Clip, origin: NDArray[np.int32], region: NDArray[np.int32]) -> Clip:
    """Cut a region out of a clip whose first pixel is at `origin`."""
    top, left, height, width = (region - [*origin, 0, 0]).tolist()
    return clip[:, top : top + height, left : left + width]
