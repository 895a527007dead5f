"""People on key frames with their actions, and the transformation of their boxes into a clip.

Crop, resize and flip of the pixels are applied to the boxes too. Boxes in a clip are x1, y1, x2, y2 in its pixels.

Legend: P people, C actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mvd_scale.data.sampling.sampler import CopyPlan
from mvd_scale.detection.boxes import Boxes

Corners = NDArray[np.float64]


@dataclass(frozen=True)
class PersonBoxes:
    """People of ground truth: one box per person, with all its actions."""

    frame: NDArray[np.int64]
    """Index into `Boxes.frames` of each person, ascending, (P,)."""

    corners: Corners
    """x1, y1, x2, y2 as fractions of the frame, (P, 4)."""

    actions: NDArray[np.bool_]
    """Whether each person performs each action, (P, C); column c is action c + 1."""

    @classmethod
    def of(cls, truth: Boxes, classes: int) -> PersonBoxes:
        """Group ground truth by person: lines with the same key frame and the same box are one person."""
        lines = np.column_stack([truth.frame, truth.corners])
        persons, person = np.unique(lines, axis=0, return_inverse=True)
        actions = np.zeros((len(persons), classes), dtype=np.bool_)
        actions[person.reshape(-1), truth.actions - 1] = True
        return cls(persons[:, 0].astype(np.int64), persons[:, 1:], actions)

    def on(self, frame: int) -> slice:
        """Return the slice of the people on a key frame, given by its index into `Boxes.frames`."""
        first, end = np.searchsorted(self.frame, [frame, frame + 1]).tolist()
        return slice(first, end)


def transform_boxes(corners: Corners, plan: CopyPlan, side: int) -> Corners:
    """Transform boxes of a frame into a training clip of it; parts outside of the clip are cut off.

    Args:
        corners: fractions of the upright frame, (P, 4).
        plan: crop and flip of the clip.
        side: side of the clip, in pixels.

    Returns:
        (P, 4) in pixels of the clip; a box that is entirely outside has no area.
    """
    (height, width), (top, left, crop_height, crop_width) = plan.crop.frame, plan.crop.box
    scale = np.array([side / crop_width, side / crop_height] * 2)
    boxes = (corners * [width, height, width, height] - [left, top, left, top]) * scale
    if plan.flip:
        boxes = np.column_stack([side - boxes[:, 2], boxes[:, 1], side - boxes[:, 0], boxes[:, 3]])
    return boxes.clip(0, side)


def jitter_boxes(rng: Generator, boxes: Corners, jitter: tuple[float, float, float, float], side: int) -> Corners:
    """Shift the sides of boxes at random, within a clip.

    Args:
        rng: generator; four numbers are drawn per box.
        boxes: (P, 4) in pixels.
        jitter: largest shifts, see `TrainingKeyFrames.jitter`.
        side: side of the clip, in pixels.

    Returns:
        (P, 4) in pixels.
    """
    x_out, x_in, y_out, y_in = jitter
    low, high = np.array([-x_out, -y_out, -x_in, -y_in]), np.array([x_in, y_in, x_out, y_out])
    moved = boxes + np.tile(boxes[:, 2:] - boxes[:, :2], 2) * rng.uniform(low, high, size=boxes.shape)
    return moved.clip(0, side)


def widen_boxes(boxes: Corners, widen: tuple[float, float], size: tuple[int, int]) -> Corners:
    """Enlarge boxes by fractions of their width and height, within a frame of size (height, width): (P, 4) pixels."""
    grown = (boxes[:, 2:] - boxes[:, :2]) * widen / 2
    height, width = size
    return np.column_stack([boxes[:, :2] - grown, boxes[:, 2:] + grown]).clip(0, [width, height, width, height])


def has_area(boxes: Corners) -> NDArray[np.bool_]:
    """Whether each box has an area above 0, (P,)."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
