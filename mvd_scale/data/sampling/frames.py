"""Rules that choose the frames of a clip."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray


def draw_frames(rng: Generator, rule: str, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Draw frame numbers of a clip by a rule of `data.sampling`: int64 (frames,), ascending."""
    if rule == "dense":
        return dense_frames(rng, available, frames, stride)
    if rule == "window":
        return window_frames(rng, available, frames, stride)
    if rule == "segments":
        return segment_frames(rng, available, frames)
    return whole_segment_frames(rng, available, frames)


def dense_frames(rng: Generator, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Draw `frames` frame numbers that are `stride` apart, from a random start.

    The published pre-training rule (MVD, VideoMAE): the start is uniform over the positions where frames x stride
    frames fit into the video, or 0 if they do not fit. Numbers advance as long as they stay below the number of the
    last frame of the video; after that, the number reached is repeated.

    Returns:
        int64 (frames,), ascending, within 0 .. available - 1.
    """
    start = int(rng.integers(max(available - frames * stride + 1, 1)))
    steps = max((available - 2 - start) // stride, 0)
    return start + stride * np.minimum(np.arange(frames, dtype=np.int64), steps)


def window_frames(rng: Generator, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Draw frame numbers that are spread evenly over a window of frames x stride frames, at a random position.

    The published fine-tuning rule for Kinetics, UCF101 and HMDB51. A video that is not longer than the window gives one
    frame for every `stride` frames, spread evenly, and then repeats its last frame.

    Returns:
        int64 (frames,), ascending, within 0 .. available - 1.
    """
    window = frames * stride
    if available > window:
        end = int(rng.integers(window, available))
        places = np.linspace(end - window, end, num=frames)
        return np.clip(places, end - window, end - 1).astype(np.int64)
    whole = min(available // stride, frames)
    places = np.concatenate([np.linspace(0, available, num=whole), np.full(frames - whole, float(available))])
    return np.clip(places, 0, available - 1).astype(np.int64)


def segment_frames(rng: Generator, available: int, frames: int) -> NDArray[np.int64]:
    """Draw one random frame number from each of `frames` equal segments of the whole video (TSN).

    The rule by which MVD fine-tunes on Something-Something V2. The segments divide the span from the first to the last
    frame. Their borders are rounded (halves to even) and belong to both neighbours, so a frame may be drawn twice. A
    video with fewer frames than segments gives frames of its whole length too, some of them several times.

    Returns:
        int64 (frames,), ascending, within 0 .. available - 1.
    """
    borders = np.round(np.arange(frames + 1) * ((available - 1) / frames)).astype(np.int64)
    return rng.integers(borders[:-1], borders[1:], endpoint=True)


def whole_segment_frames(rng: Generator, available: int, frames: int) -> NDArray[np.int64]:
    """Draw one random frame number from each of `frames` segments with a whole number of frames each.

    The rule by which VideoMAE fine-tunes on Something-Something V2. As published, frames that remain at the end after
    the division are never drawn, and a video with fewer frames than segments gives its first frame only.

    Returns:
        int64 (frames,), ascending, within 0 .. available - 1.
    """
    length = available // frames
    if not length:
        return np.zeros(frames, dtype=np.int64)
    return np.arange(frames, dtype=np.int64) * length + rng.integers(length, size=frames)
