"""The views of a video at test time: several clips in time, three crops of each, all fixed (published evaluation).

Legend: F frames of a video, T frames of a clip.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dense_views(total: int, *, frames: int, stride: int, views: int) -> NDArray[np.int64]:
    """Clips of every `stride`-th frame, spread evenly from the beginning to the end (Kinetics-400: 5 views).

    Args:
        total: F.
        frames: T.
        stride: frames between two frames of a clip; a video that is too short repeats its last such frame.
        views: number of clips.

    Returns:
        frame numbers, int64 (views, T).
    """
    kept = np.arange(0, total, stride)
    kept = np.pad(kept, (0, max(frames - len(kept), 0)), mode="edge")
    step = (len(kept) - frames) / max(views - 1, 1)
    starts = [int(view * step) for view in range(views)]
    return np.stack([kept[start : start + frames] for start in starts])


def uniform_views(total: int, *, frames: int, views: int) -> NDArray[np.int64]:
    """Clips of evenly spread frames, interleaved: the video is cut into T x views parts (Something-Something V2).

    Args:
        total: F.
        frames: T.
        views: number of clips; part i gives its middle frame to clip i modulo views.

    Returns:
        frame numbers, int64 (views, T).
    """
    # Borders are rounded half to even, and the middle down, as in the published code: the indices depend on it.
    borders = np.round((total - 1) / (frames * views) * np.arange(frames * views + 1)).astype(np.int64)
    middles = (borders[:-1] + borders[1:]) // 2
    return middles.reshape(frames, views).T


def resized_size(height: int, width: int, *, side: int) -> tuple[int, int]:
    """Height and width of a frame whose shorter side was resized to `side`; the longer one is rounded down."""
    return (side * height // width, side) if width < height else (side, side * width // height)


def crop_corners(height: int, width: int, *, side: int, crops: int) -> list[tuple[int, int]]:
    """Top and left of square crops, spread along the longer side of a frame whose shorter side is `side`."""
    step = (max(height, width) - side) / max(crops - 1, 1)
    offsets = [int(crop * step) for crop in range(crops)]
    return [(offset, 0) if height > width else (0, offset) for offset in offsets]
