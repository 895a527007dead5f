"""Two tests of the same videos side by side: accuracies and their difference, each with its interval.

Legend: X videos.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvd_scale.errors import UserError
from mvd_scale.evaluation.results import EvalResult
from mvd_scale.utils.io import write_atomic

_QUANTILE = 1.959964
"""Quantile of the normal distribution at 97.5 %."""

RESAMPLES = 10_000
"""Draws of the test videos, with replacement."""

FILE = "comparison.json"


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, as shares."""

    value: float
    low: float
    high: float

    def to_text(self, *, signed: bool = False) -> str:
        """In percent."""
        low, value, high = (
            f"{100 * x:+.1f}" if signed else f"{100 * x:.1f}" for x in (self.low, self.value, self.high)
        )
        return f"{value} (95 % interval {low} to {high})"


@dataclass(frozen=True)
class Comparison:
    """Top-1 of two classifiers on the same videos; the intervals tell how far the choice of videos moves them."""

    videos: int
    first: Estimate
    second: Estimate

    difference: Estimate
    """First less second, resampled as pairs."""

    def write(self, out: Path) -> None:
        """Leave `comparison.json`."""
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, out: Path) -> Comparison:
        """A written comparison from its folder."""
        values = json.loads((out / FILE).read_text())
        return cls(values.pop("videos"), **{name: Estimate(**estimate) for name, estimate in values.items()})


def compare_tests(first: Path, second: Path) -> Comparison:
    """Compare two finished tests.

    Args:
        first: folder of a test.
        second: folder of another one on the same videos.

    Raises:
        UserError: a folder holds no finished test, or the videos differ.
    """
    tests = [EvalResult.load(folder) for folder in (first, second)]
    pair = [test.predictions for test in tests]
    if list(tests[0].names) != list(tests[1].names) or (pair[0].labels != pair[1].labels).any():
        raise UserError(f"{first} and {second} are evaluations of different videos: they cannot be compared")
    one, other = ((predictions.predicted == predictions.labels).astype(np.float64) for predictions in pair)
    return Comparison(len(one), bootstrap(one), bootstrap(other), bootstrap(one - other))


def bootstrap(values: NDArray[np.float64]) -> Estimate:
    """Mean of (X,) and the 2.5th and 97.5th percentile of the means of resampled values."""
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def wilson_interval(share: float, count: int) -> Estimate:
    """Share of correct videos with its 95 % interval by Wilson's score (1927), which stays within 0 and 1.

    Args:
        share: observed share, 0 to 1.
        count: number of videos; with none the interval is 0 to 1.
    """
    if not count:
        return Estimate(share, 0.0, 1.0)
    spread = _QUANTILE**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _QUANTILE / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Estimate(share, max(centre - half, 0.0), min(centre + half, 1.0))
