"""Frame mAP by AVA's protocol: PASCAL VOC's average precision of each action over all key frames.

A detection is correct if its IoU with the ground truth box that it overlaps most (of the same action on the same key
frame) is at least 0.5, and no detection of a higher score has been matched with that ground truth box.

Legend: X detections, G boxes of ground truth.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvd_scale.detection.boxes import Boxes, KeyFrame
from mvd_scale.errors import UserError

IOU = 0.5
"""Least IoU of a detection with its ground truth box."""


@dataclass(frozen=True)
class ActionScore:
    """Average precision of one action."""

    name: str
    truth: int
    """Number of ground truth boxes."""

    found: int
    """Number of the model's detections."""

    precision: float
    """Average precision, 0 to 1; nan without ground truth."""


@dataclass(frozen=True)
class FrameMap:
    """Average precision of every action, and their mean."""

    actions: Mapping[int, ActionScore]

    @property
    def mean(self) -> float:
        """Mean average precision (mAP) over the actions that have ground truth, 0 to 1."""
        return float(np.mean([action.precision for action in self.actions.values() if action.truth]))

    @property
    def tested(self) -> int:
        """Number of actions that have ground truth."""
        return sum(bool(action.truth) for action in self.actions.values())

    def write(self, path: Path) -> None:
        """Write a CSV table with one line per action; the file is renamed into place, so it is never partial."""
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["action", "name", "boxes", "found", "average_precision"])
            for number, action in self.actions.items():
                precision = f"{action.precision:.4f}" if action.truth else ""
                writer.writerow([number, action.name, action.truth, action.found, precision])
        os.replace(partial, path)


def compute_frame_map(
    truth: Boxes,
    found: Boxes,
    actions: Mapping[int, str],
    excluded: Collection[KeyFrame] = frozenset(),
    *,
    per_frame: int | None = None,
) -> FrameMap:
    """Compute the average precision of each action.

    Args:
        truth: all ground truth boxes.
        found: detections with action and score; of equal scores the earlier one ranks first.
        actions: names of the evaluated actions by number; boxes of other actions are ignored.
        excluded: key frames that are ignored.
        per_frame: largest number of detections that count per key frame, those of the highest scores; all if None.

    Raises:
        UserError: no ground truth box has one of the actions.
    """
    listed = np.array(list(actions))
    truth = truth.without(excluded)
    found = found.without(excluded)
    truth, found = (boxes.take(np.isin(boxes.actions, listed)) for boxes in (truth, found))
    if not len(truth):
        raise UserError(
            f"the ground truth has no box of one of the {len(actions)} listed actions on a key frame that is not "
            "excluded: check that annotations, action list and excluded key frames belong together"
        )
    if per_frame is not None:
        found = found.take(_highest(found, per_frame))
    number = {frame: n for n, frame in enumerate(truth.frames)}
    place = np.array([number.get(frame, -1) for frame in found.frames], dtype=np.int64)[found.frame]
    scores = {}
    for action, name in actions.items():
        wanted, given = truth.actions == action, found.actions == action
        order = np.argsort(-found.scores[given], kind="stable")
        right = _right(truth.corners[wanted], truth.frame[wanted], found.corners[given][order], place[given][order])
        count = int(wanted.sum())
        scores[action] = ActionScore(name, count, len(order), average_precision(right, count))
    return FrameMap(scores)


def average_precision(right: NDArray[np.bool_], truth: int) -> float:
    """Compute the area under the monotone envelope of precision over recall.

    Args:
        right: whether each detection is correct, from the highest score to the lowest, (X,).
        truth: number of ground truth boxes, G; the result is nan if it is 0.
    """
    if not truth:
        return float("nan")
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / truth)


def overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the IoU of pairs of boxes, (N, 4) and (N, 4) to (N,); 0 if both are empty."""
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    common = (high - low).clip(min=0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (one, other)]
    union = areas[0] + areas[1] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _right(
    truth: NDArray[np.float64], frames: NDArray[np.int64], found: NDArray[np.float64], places: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Decide which detections of one action are correct; they are ordered by score, the highest first.

    Args:
        truth: ground truth boxes (G, 4).
        frames: index of the key frame of each of them, (G,).
        found: detections (X, 4).
        places: index of the key frame of each of them, by the same numbering, (X,).

    Returns:
        (X,).
    """
    # Vectorised over all pairs of detection and ground truth on the same key frame: there are millions of them. Ground
    # truth is sorted by key frame, so the partners of a detection are `count` consecutive entries from `first` on.
    by_frame = np.argsort(frames, kind="stable")
    first = np.searchsorted(frames[by_frame], places, side="left")
    count = np.searchsorted(frames[by_frame], places, side="right") - first
    box = np.repeat(np.arange(len(found)), count)
    within = np.arange(len(box)) - np.repeat(np.cumsum(count) - count, count)
    partner = by_frame[np.repeat(first, count) + within]
    shared = overlap(found[box], truth[partner])
    # The best partner of each detection is the last entry of its group after sorting by IoU; of equal ones the one that
    # is listed first.
    order = np.lexsort((-within, shared, box))
    last = np.flatnonzero(np.append(np.diff(box[order]) > 0, True)) if len(box) else np.empty(0, np.int64)
    best = order[last]
    best = best[shared[best] >= IOU]
    # `box` ascends and lower indices have higher scores, so the first occurrence of a partner is the match.
    _, claims = np.unique(partner[best], return_index=True)
    right = np.zeros(len(found), dtype=np.bool_)
    right[box[best[claims]]] = True
    return right


def _highest(found: Boxes, per_frame: int) -> NDArray[np.bool_]:
    """Select the `per_frame` detections of the highest scores on each key frame, (X,)."""
    order = np.lexsort((np.arange(len(found)), -found.scores, found.frame))
    frames = found.frame[order]
    rank = np.arange(len(order)) - np.searchsorted(frames, frames, side="left")
    kept = np.zeros(len(found), dtype=np.bool_)
    kept[order[rank < per_frame]] = True
    return kept
