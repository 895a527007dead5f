"""Boxes of people on key frames, in columns: ground truth, boxes of a person detector, or results of a model.

Legend: F key frames, X boxes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray


class KeyFrame(NamedTuple):
    """One annotated moment of a video; AVA has one per second."""

    video: str
    second: float


@dataclass(frozen=True)
class Boxes:
    """Boxes on key frames. A person of ground truth has one box per action."""

    frames: tuple[KeyFrame, ...]
    """Distinct key frames in any order; some may have no box."""

    frame: NDArray[np.int64]
    """Index into `frames` of each box, (X,)."""

    corners: NDArray[np.float64]
    """x1, y1, x2, y2 as fractions of the frame's width and height, (X, 4)."""

    actions: NDArray[np.int64]
    """Number of the action of each box, (X,); 0 if there is none."""

    scores: NDArray[np.float64]
    """Score of each box, (X,); 1 in ground truth."""

    @classmethod
    def of(
        cls,
        keys: Sequence[KeyFrame],
        corners: Sequence[Sequence[float]],
        actions: Sequence[int],
        scores: Sequence[float],
    ) -> Self:
        """Build from sequences with one entry per box; `keys` are the boxes' key frames."""
        frames = tuple(dict.fromkeys(keys))
        number = {frame: n for n, frame in enumerate(frames)}
        return cls(
            frames,
            np.array([number[key] for key in keys], dtype=np.int64),
            np.array(corners, dtype=np.float64).reshape(-1, 4),
            np.array(actions, dtype=np.int64),
            np.array(scores, dtype=np.float64),
        )

    def __len__(self) -> int:
        return len(self.frame)

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Self:
        """Select boxes by a mask (X,) or by indices."""
        return type(self)(
            self.frames, self.frame[chosen], self.corners[chosen], self.actions[chosen], self.scores[chosen]
        )

    def without(self, excluded: Collection[KeyFrame]) -> Self:
        """Drop the boxes on excluded key frames."""
        stays = np.array([frame not in excluded for frame in self.frames], dtype=np.bool_)
        return self.take(stays[self.frame])
