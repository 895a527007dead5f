"""Boxes of people on key frames, in columns: ground truth, what a detector of people found, or what a model says.

Legend: F key frames, X boxes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self


class KeyFrame(NamedTuple):
    """A moment of a video; AVA names one in every second."""

    video: str
    second: float


@dataclass(frozen=True)
class Boxes:
    """Boxes on key frames. A box of ground truth stands once for each of its actions."""

    frames: tuple[KeyFrame, ...]
    """Distinct, in any order; some may have no box."""

    frame: NDArray[np.int64]
    """Which of the frames, (X,)."""

    corners: NDArray[np.float64]
    """x1, y1, x2, y2 as shares of the frame's width and height, (X, 4)."""

    actions: NDArray[np.int64]
    """Number of the action, (X,); 0 where none is told."""

    scores: NDArray[np.float64]
    """(X,); 1 in ground truth."""

    @classmethod
    def of(
        cls,
        keys: Sequence[KeyFrame],
        corners: Sequence[Sequence[float]],
        actions: Sequence[int],
        scores: Sequence[float],
    ) -> Self:
        """Boxes told one by one, each with its key frame."""
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
        """Some of the boxes."""
        return type(self)(
            self.frames, self.frame[chosen], self.corners[chosen], self.actions[chosen], self.scores[chosen]
        )

    def without(self, excluded: Collection[KeyFrame]) -> Self:
        """Those on other key frames."""
        stays = np.array([frame not in excluded for frame in self.frames], dtype=np.bool_)
        return self.take(stays[self.frame])
