"""Figures of a test against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mvd_scale.evaluation.metrics import BINS, Predictions


def predictions(labels: list[int], views: list, decoded: list[bool] | None = None) -> Predictions:
    scores = np.array(views, dtype=np.float32)
    if scores.ndim == 2:
        scores = scores[:, None]
    return Predictions(np.array(labels), np.array(decoded or [True] * len(labels)), scores)


SIX = [[6, 5, 4, 3, 2, 1], [1, 6, 5, 4, 3, 2], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]]


def test_top_counts_the_highest_scores() -> None:
    result = predictions([0, 2, 4, 5], SIX)
    assert [result.top(k) for k in (1, 2, 5, 6)] == [0.25, 0.5, 0.75, 1.0]


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    result = predictions([0, 1, 2], [[1, 1, 1]] * 3)
    assert result.predicted.tolist() == [0, 0, 0]
    assert [result.top(k) for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]


def test_a_video_that_cannot_be_decoded_is_wrong() -> None:
    result = predictions([0, 0], [[1, 0], [1, 0]], [True, False])
    assert result.top(1) == result.top(2) == 0.5
    assert result.predicted.tolist() == [0, -1]
    assert result.confusion.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert result.summary()["not_decoded"] == 1
    assert result.view_accuracy.tolist() == [0.5]


def test_classes_count_alike_whatever_their_number_of_videos() -> None:
    result = predictions([0, 0, 0, 1], [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    assert result.top(1) == 0.75
    np.testing.assert_allclose(result.class_accuracy, [2 / 3, 1, np.nan])
    assert result.mean_class_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert result.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_a_video_s_score_is_the_mean_of_its_views() -> None:
    # Two views vote for class 0, the third so surely for class 1 that the mean is.
    result = predictions([1], [[[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]]])
    assert result.top(1) == 1
    assert result.view_accuracy.tolist() == [0, 0, 1]


def test_calibration_error() -> None:
    # Sure to 0.9 and right in 3 of 4; sure to 0.6 and right in 1 of 2.
    sure = [[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2
    result = predictions([0, 0, 0, 1, 0, 1], sure)
    assert result.calibration_error == pytest.approx((4 * 0.15 + 2 * 0.1) / 6, abs=1e-6)
    bins = result.reliability()
    assert len(bins) == BINS
    assert [bins[int(s * BINS)] for s in (0.9, 0.6)] == [
        (4, pytest.approx(0.9), pytest.approx(0.75)),
        (2, pytest.approx(0.6), pytest.approx(0.5)),
    ]


def test_a_perfectly_sure_and_right_classifier_has_no_calibration_error() -> None:
    assert predictions([0, 1], [[1, 0], [0, 1]]).calibration_error == 0


def test_scores_that_are_no_numbers_are_never_right() -> None:
    result = predictions([0, 1], [[np.nan, np.nan], [0, 1]])
    assert result.top(1) == result.top(5) == 0.5
    assert result.confusion.tolist() == [[0, 0, 1], [0, 1, 0]]
