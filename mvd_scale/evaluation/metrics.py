"""Metrics of a classifier: accuracy, confusion and calibration.

Legend: X videos, V views, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Bins of the reliability diagram."""


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions of all evaluated videos."""

    labels: NDArray[np.int64]
    """True class of each video, (X,)."""

    decoded: NDArray[np.bool_]
    """Whether each video could be decoded, (X,); videos that could not count as wrong."""

    views: NDArray[np.float32]
    """Softmax scores of each view, (X, V, C)."""

    @property
    def scores(self) -> NDArray[np.float32]:
        """Mean of the views' softmax scores, (X, C): the published score of a video."""
        scores: NDArray[np.float32] = self.views.mean(1)
        return scores

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Class of the highest score, (X,); -1 if the video could not be decoded or its scores are not finite."""
        return np.where(self.decoded & np.isfinite(self.scores).all(1), self.scores.argmax(1), -1)

    def top(self, count: int) -> float:
        """Return the share (0 to 1) of videos whose label is among the `count` highest scores."""
        return float(self._among(count).mean())

    def _among(self, count: int) -> NDArray[np.bool_]:
        own = np.take_along_axis(self.scores, self.labels[:, None], 1)
        # Of equal scores the lower class ranks first, as with argmax.
        ahead = (self.scores > own).sum(1)
        equal = (self.scores == own) & (np.arange(self.scores.shape[1]) < self.labels[:, None])
        # Comparisons with NaN are false, so a video with NaN scores would seem correct: it is excluded explicitly.
        return (ahead + equal.sum(1) < count) & self.decoded & np.isfinite(self.scores).all(1)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Number of videos by label (row) and prediction (column), (C, C + 1); the last column counts videos that
        could not be decoded."""
        classes = self.scores.shape[1]
        table = np.zeros((classes, classes + 1), dtype=np.int64)
        np.add.at(table, (self.labels, np.where(self.decoded, self.predicted, classes)), 1)
        return table

    @property
    def class_accuracy(self) -> NDArray[np.float64]:
        """Share of correct predictions per class, (C,); nan for a class without videos."""
        table = self.confusion
        with np.errstate(invalid="ignore"):
            accuracy: NDArray[np.float64] = np.diagonal(table) / table.sum(1)
        return accuracy

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the class accuracies over the classes that have videos, 0 to 1."""
        return float(np.nanmean(self.class_accuracy))

    @property
    def view_accuracy(self) -> NDArray[np.float64]:
        """Top-1 accuracy of each view alone, (V,)."""
        right = (self.views.argmax(2) == self.labels[:, None]) & self.decoded[:, None]
        accuracy: NDArray[np.float64] = right.mean(0)
        return accuracy

    def reliability(self) -> list[tuple[int, float, float]]:
        """Return (videos, mean highest score, accuracy) of each bin of the highest score, over decoded videos."""
        scores = self.scores[self.decoded]
        sure, right = scores.max(1), scores.argmax(1) == self.labels[self.decoded]
        place = np.minimum((sure * BINS).astype(int), BINS - 1)
        return [
            (int(inside.sum()), float(sure[inside].mean()), float(right[inside].mean()))
            if (inside := place == b).any() else (0, 0.0, 0.0)
            for b in range(BINS)
        ]  # fmt: skip

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean difference of confidence and accuracy over bins, weighted by videos."""
        bins = self.reliability()
        total = max(sum(count for count, _, _ in bins), 1)
        return sum(count * abs(sure - right) for count, sure, right in bins) / total

    def summary(self) -> dict[str, float | int | list[float]]:
        """Return the figures of the whole evaluation by name; shares are 0 to 1."""
        return {
            "videos": len(self.labels),
            "not_decoded": int((~self.decoded).sum()),
            "top1": self.top(1),
            "top5": self.top(5),
            "mean_class_accuracy": self.mean_class_accuracy,
            "calibration_error": self.calibration_error,
            "view_top1": self.view_accuracy.tolist(),
        }
