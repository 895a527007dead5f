"""Key frames of videos: where they lie in the files, and which frames are around them.

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
    """Key frames whose videos are there: what one clip each is made of."""

    manifest: Manifest
    """A row for each of them: its video."""

    numbers: NDArray[np.int64]
    """Which of `Boxes.frames` each of them is, ascending, (F,)."""

    centres: NDArray[np.int64]
    """Its frame of the video, (F,)."""

    def __len__(self) -> int:
        return len(self.numbers)


def find_key_frames(boxes: Boxes, videos: Manifest, starts_at: float, key: str) -> KeyFrames:
    """All key frames that have boxes and whose videos reach them. What is left out is counted and named in the log.

    Args:
        boxes: of the annotations.
        videos: a video is called as its file is, without the suffix.
        starts_at: second of the annotations at which the files start.
        key: of the recipe, for messages.

    Raises:
        UserError: two videos have the same name, or no key frame is left.
    """
    rows = _rows_by_name(videos, key)
    numbers, of_video, centres, missing = [], [], [], Counter[str]()
    for number in np.unique(boxes.frame).tolist():
        frame = boxes.frames[number]
        row = rows.get(frame.video)
        if row is None:
            missing[f"{frame.video} is not there"] += 1
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
            f"{key}: no key frame of the annotations can be used, because {reason}. A video must be called as in the "
            "annotations, with any suffix; starts_at says at which second of them the files start"
        )
    return KeyFrames(
        videos.take(np.array(of_video, dtype=np.int64)),
        np.array(numbers, dtype=np.int64),
        np.array(centres, dtype=np.int64),
    )


def frames_around(centre: int, available: int, *, frames: int, stride: int) -> NDArray[np.int64]:
    """Every `stride`-th frame of a window of frames x stride around a place; beyond the video its ends are repeated.

    As in the published code (VideoMAE), the first frame is the one in the middle of the window's first stride.

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
    """The frame that is shown at a second of a file, or why there is none."""
    reason = videos.left_out[row]
    if reason is not None:
        return f"cannot be used: {reason}"
    # Where frames are not equally long, the mean rate is the nearest that a manifest tells.
    rate = float(videos.frames[row] / videos.duration[row] if videos.variable_rate[row] else videos.fps[row])
    if not rate:
        return "does not tell its frame rate"
    centre = round(second * rate)
    return centre if 0 <= centre < videos.frames[row] else "does not reach them"
