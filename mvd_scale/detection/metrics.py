"""Frame mAP by the protocol of AVA: PASCAL VOC's average precision of each action over all key frames.

A box found is right if, of the ground truth boxes of its action on its key frame, the one that it overlaps most does so
by an IoU of 0.5, and no box of a higher score has claimed that one already.

Legend: X boxes found, G boxes of ground truth.
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
"""Overlap from which on a box counts as found."""


@dataclass(frozen=True)
class ActionScore:
    """How well one action is found."""

    name: str
    truth: int
    """Boxes of ground truth."""

    found: int
    """Boxes that the model gives."""

    precision: float
    """Average precision; nan without ground truth."""


@dataclass(frozen=True)
class FrameScore:
    """The figures of a test."""

    actions: Mapping[int, ActionScore]

    @property
    def mean(self) -> float:
        """mAP: the mean over the actions that have ground truth."""
        return float(np.mean([action.precision for action in self.actions.values() if action.truth]))

    @property
    def tested(self) -> int:
        """Actions that have ground truth."""
        return sum(bool(action.truth) for action in self.actions.values())

    def write(self, path: Path) -> None:
        """Write a table with a line for each action; it appears whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["action", "name", "boxes", "found", "average_precision"])
            for number, action in self.actions.items():
                precision = f"{action.precision:.4f}" if action.truth else ""
                writer.writerow([number, action.name, action.truth, action.found, precision])
        os.replace(partial, path)


def frame_score(
    truth: Boxes,
    found: Boxes,
    actions: Mapping[int, str],
    excluded: Collection[KeyFrame] = frozenset(),
    *,
    per_frame: int | None = None,
) -> FrameScore:
    """Average precision of each action, and their mean.

    Args:
        truth: all boxes of the test.
        found: boxes with an action and a score; of equal scores the earlier one comes first.
        actions: those that are tested, by number; boxes of others do not count.
        excluded: key frames that do not count.
        per_frame: of each key frame, only so many boxes of the highest scores count; all if left out.

    Raises:
        UserError: no box of ground truth has one of the actions.
    """
    listed = np.array(list(actions))
    truth = truth.without(excluded)
    found = found.without(excluded)
    truth, found = (boxes.take(np.isin(boxes.actions, listed)) for boxes in (truth, found))
    if not len(truth):
        raise UserError(
            f"the ground truth has no box of one of the {len(actions)} listed actions on a key frame that counts: see "
            "that annotations, action list and excluded key frames belong together"
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
    return FrameScore(scores)


def average_precision(right: NDArray[np.bool_], truth: int) -> float:
    """Area under the envelope of precision over recall.

    Args:
        right: of each box, from the highest score to the lowest, whether it is right, (X,).
        truth: G; nan if it is 0.
    """
    if not truth:
        return float("nan")
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / truth)


def overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of pairs of boxes, (N, 4) and (N, 4) to (N,); 0 where both are empty."""
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    common = (high - low).clip(min=0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (one, other)]
    union = areas[0] + areas[1] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _right(
    truth: NDArray[np.float64], frames: NDArray[np.int64], found: NDArray[np.float64], places: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether each box found, from the highest score down, is right; all of one action.

    Args:
        truth: (G, 4).
        frames: key frame of each of them, (G,).
        found: (X, 4).
        places: key frame of each of them by the same numbers, (X,).
    """
    # All pairs on the same key frame at once: a test has millions of boxes.
    by_frame = np.argsort(frames, kind="stable")
    first = np.searchsorted(frames[by_frame], places, side="left")
    count = np.searchsorted(frames[by_frame], places, side="right") - first
    box = np.repeat(np.arange(len(found)), count)
    within = np.arange(len(box)) - np.repeat(np.cumsum(count) - count, count)
    partner = by_frame[np.repeat(first, count) + within]
    shared = overlap(found[box], truth[partner])
    # The best partner of each box: the last one of its group when the group is sorted by overlap, and the first listed
    # of equal ones.
    order = np.lexsort((-within, shared, box))
    last = np.flatnonzero(np.append(np.diff(box[order]) > 0, True)) if len(box) else np.empty(0, np.int64)
    best = order[last]
    best = best[shared[best] >= IOU]
    # `box` ascends, and lower numbers have higher scores: the first claim on a partner counts.
    _, claims = np.unique(partner[best], return_index=True)
    right = np.zeros(len(found), dtype=np.bool_)
    right[box[best[claims]]] = True
    return right


def _highest(found: Boxes, per_frame: int) -> NDArray[np.bool_]:
    """Which boxes are among the highest scores of their key frame."""
    order = np.lexsort((np.arange(len(found)), -found.scores, found.frame))
    frames = found.frame[order]
    rank = np.arange(len(order)) - np.searchsorted(frames, frames, side="left")
    kept = np.zeros(len(found), dtype=np.bool_)
    kept[order[rank < per_frame]] = True
    return kept
