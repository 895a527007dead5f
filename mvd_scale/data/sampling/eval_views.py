"""Test views of a video: several clips in time times several crops, all at fixed positions (published evaluation).

Legend: F frames of a video, T frames of a clip.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mvd_scale.config.data import ViewsConfig


def view_frame_indices(views: ViewsConfig, total: int, *, frames: int) -> NDArray[np.int64]:
    """List the frame numbers of all test clips of a video of `total` frames (F): int64 (clips, T)."""
    if views.sampling == "dense":
        return dense_views(total, frames=frames, stride=views.stride, views=views.clips)
    if views.sampling == "uniform":
        return uniform_views(total, frames=frames, views=views.clips)
    assert views.every is not None
    return sliding_views(total, frames=frames, stride=views.stride, every=views.every)


def dense_views(total: int, *, frames: int, stride: int, views: int) -> NDArray[np.int64]:
    """Spread clips of every `stride`-th frame evenly from the start to the end of the video (Kinetics-400: 5 views).

    Args:
        total: frames of the video (F).
        frames: frames of a clip (T).
        stride: frames from one frame of a clip to the next; in too short a video, the last such frame is repeated.
        views: number of clips; a single clip lies in the middle.

    Returns:
        frame numbers, int64 (views, T).
    """
    kept = np.arange(0, total, stride)
    kept = np.pad(kept, (0, max(frames - len(kept), 0)), mode="edge")
    room = len(kept) - frames
    starts = [int(view * (room / (views - 1))) for view in range(views)] if views > 1 else [room // 2]
    return np.stack([kept[start : start + frames] for start in starts])


def uniform_views(total: int, *, frames: int, views: int) -> NDArray[np.int64]:
    """Interleave clips of evenly spread frames, one frame from each of T x views segments (Something-Something V2).

    Args:
        total: frames of the video (F).
        frames: frames of a clip (T).
        views: number of clips; the middle frame of segment i belongs to clip i modulo views.

    Returns:
        frame numbers, int64 (views, T).
    """
    # As in the published code, borders are rounded half to even, and middles are rounded down.
    borders = np.round((total - 1) / (frames * views) * np.arange(frames * views + 1)).astype(np.int64)
    middles = (borders[:-1] + borders[1:]) // 2
    return middles.reshape(frames, views).T


def sliding_views(total: int, *, frames: int, stride: int, every: int) -> NDArray[np.int64]:
    """List clips of every `stride`-th frame that start `every` frames apart; the last one reaches the end of the video.

    Returns:
        frame numbers, int64 (clips, T); the last frame of the video stands for frames beyond it.
    """
    count = 1 + max(-(-(total - frames * stride) // every), 0)
    starts = np.arange(count, dtype=np.int64)[:, None] * every
    return np.minimum(starts + np.arange(frames, dtype=np.int64) * stride, total - 1)


def resized_size(height: int, width: int, *, side: int) -> tuple[int, int]:
    """Compute height and width after resizing the shorter side to `side` pixels; the longer side is rounded down."""
    return (side * height // width, side) if width < height else (side, side * width // height)


def crop_corners(height: int, width: int, *, side: int, crops: int) -> list[tuple[int, int]]:
    """List top and left, in pixels, of square crops that are spread evenly along the longer side of a frame.

    Args:
        height: height of the frame in pixels.
        width: width of the frame in pixels.
        side: shorter side of the frame, and side of the crops, in pixels.
        crops: number of crops; a single crop lies in the middle.
    """
    room = max(height, width) - side
    offsets = [int(crop * (room / (crops - 1))) for crop in range(crops)] if crops > 1 else [room // 2]
    return [(offset, 0) if height > width else (0, offset) for offset in offsets]
