"""Location of key frames in video files, and the frames of the clips around them.

Legend: F key frames, T frames of a clip.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.manifest import Manifest
from mvd_scale.detection.boxes import Boxes
from mvd_scale.errors import UserError

logger = logging.getLogger("mvd_scale")


@dataclass(frozen=True)
class KeyFrames:
    """Key frames whose videos are available; each gives one clip."""

    manifest: Manifest
    """Manifest with one row per key frame: its video."""

    numbers: NDArray[np.int64]
    """Index into `Boxes.frames` of each key frame, ascending, (F,)."""

    centres: NDArray[np.int64]
    """Frame number of each key frame in its video, (F,)."""

    def __len__(self) -> int:
        return len(self.numbers)


def find_key_frames(boxes: Boxes, videos: Manifest, starts_at: float, key: str) -> KeyFrames:
    """Find all key frames that have boxes and lie within their video; logs how many are left out, and why.

    Args:
        boxes: boxes of the annotations.
        videos: manifest of the videos; the name of a video is its file's name without the suffix.
        starts_at: time in the annotations, in seconds, at which the files start.
        key: key of the recipe, for messages.

    Raises:
        UserError: two videos have the same name, or no key frame is left.
    """
    rows = _rows_by_name(videos, key)
    numbers, of_video, centres, missing = [], [], [], Counter[str]()
    for number in np.unique(boxes.frame).tolist():
        frame = boxes.frames[number]
        row = rows.get(frame.video)
        if row is None:
            missing[f"{frame.video} is not among the videos"] += 1
            continue
        centre = _place(videos, row, frame.second - starts_at)
        if isinstance(centre, str):
            missing[f"{frame.video} {centre}"] += 1
        else:
            numbers.append(number)
            of_video.append(row)
            centres.append(centre)
    if missing:
        shown = "; ".join(f"{reason} ({count})" for reason, count in missing.most_common(5))
        more = f"; and {len(missing) - 5} more reasons" if len(missing) > 5 else ""
        logger.warning("%s: %d key frames are left out: %s%s", key, sum(missing.values()), shown, more)
    if not numbers:
        reason = missing.most_common(1)[0][0] if missing else "there are none"
        raise UserError(
            f"{key}: no key frame of the annotations can be used, because {reason}. Video files must be named as in "
            "the annotations, with any suffix; `starts_at` is the second of the annotations at which the files start"
        )
    return KeyFrames(
        videos.take(np.array(of_video, dtype=np.int64)),
        np.array(numbers, dtype=np.int64),
        np.array(centres, dtype=np.int64),
    )


def frames_around(centre: int, available: int, *, frames: int, stride: int) -> NDArray[np.int64]:
    """Return every `stride`-th frame of a window of frames x stride frames around a frame.

    Beyond the ends of the video its first or last frame is repeated. As in the published code (VideoMAE), the first
    frame is in the middle of the window's first stride.

    Args:
        centre: frame number in the middle of the window.
        available: number of frames of the video.
        frames: T.
        stride: distance between two frames of the clip, in frames of the video.

    Returns:
        frame numbers, int64 (T,), ascending, within 0 .. available - 1.
    """
    first = centre - frames * stride // 2 + (stride - 1) // 2
    return np.clip(first + np.arange(frames, dtype=np.int64) * stride, 0, available - 1)


def _rows_by_name(videos: Manifest, key: str) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, name in enumerate(videos.name):
        stem = PurePath(name).stem
        if stem in rows:
            raise UserError(f"{key}: {videos.name[rows[stem]]} and {name} are both called {stem}: keep one of them")
        rows[stem] = row
    return rows


def _place(videos: Manifest, row: int, second: float) -> int | str:
    """Return the number of the frame that is shown at a second of a file, or the reason why there is none."""
    reason = videos.left_out[row]
    if reason is not None:
        return f"cannot be used: {reason}"
    # With a variable frame rate the manifest has no better information than the mean rate.
    rate = float(videos.frames[row] / videos.duration[row] if videos.variable_rate[row] else videos.fps[row])
    if not rate:
        return "has no known frame rate"
    centre = round(second * rate)
    return centre if 0 <= centre < videos.frames[row] else "does not contain these seconds"
