"""Two tests side by side: pairs, intervals, and videos that differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mvd_scale.errors import UserError
from mvd_scale.evaluation.comparison import Comparison, bootstrap, compare_tests
from mvd_scale.evaluation.metrics import Predictions
from mvd_scale.evaluation.results import EvalResult as FinishedTest
from mvd_scale.evaluation.results import Origin

VIDEOS = 200


def finished(out: Path, right: NDArray[np.bool_], name: str = "video") -> Path:
    """The folder of a test of two classes, whose label is 0, that names some videos right."""
    out.mkdir()
    views = np.zeros((len(right), 1, 2), dtype=np.float32)
    views[np.arange(len(right)), 0, np.where(right, 0, 1)] = 1
    predictions = Predictions(np.zeros(len(right), dtype=np.int64), np.ones(len(right), dtype=np.bool_), views)
    names = [f"{name} {number}" for number in range(len(right))]
    FinishedTest(
        out, predictions, names, ["a", "b"], Origin("command", ["file"], "videos", "fp32", "1 view", ["1"]), {}
    ).write()
    return out


def test_figures_and_their_difference(tmp_path: Path) -> None:
    order = np.arange(VIDEOS)
    first, second = finished(tmp_path / "one", order < 150), finished(tmp_path / "two", order < 100)
    comparison = compare_tests(first, second)
    comparison.write(tmp_path / "both")
    assert Comparison.load(tmp_path / "both") == comparison
    assert comparison.videos == VIDEOS
    assert (comparison.first.value, comparison.second.value, comparison.difference.value) == (0.75, 0.5, 0.25)
    # Two standard deviations of a mean of 200 coins.
    assert 0.42 < comparison.second.low < 0.44
    assert 0.56 < comparison.second.high < 0.58
    # Pairs: the two agree on 150 videos, so the difference is surer than that of independent tests (0.092).
    assert 0.05 < comparison.difference.high - comparison.difference.value < 0.07
    assert comparison.difference.to_text(signed=True).startswith("+25.0 (95 % interval +1")


def test_a_test_beside_itself_does_not_differ(tmp_path: Path) -> None:
    folder = finished(tmp_path / "one", np.arange(VIDEOS) % 3 == 0)
    difference = compare_tests(folder, folder).difference
    assert (difference.low, difference.value, difference.high) == (0, 0, 0)


def test_other_videos_are_refused(tmp_path: Path) -> None:
    right = np.ones(VIDEOS, dtype=np.bool_)
    first, second = finished(tmp_path / "one", right), finished(tmp_path / "two", right, name="other")
    with pytest.raises(UserError, match="evaluations of different videos: they cannot be compared"):
        compare_tests(first, second)


def test_an_interval_is_the_same_every_time() -> None:
    values = np.array([0.0, 1.0, 1.0])
    assert bootstrap(values) == bootstrap(values)
