"""Intervals by Student's t, against values computed by hand."""

from __future__ import annotations

import pytest

from mvd_scale.reproduction.statistics import interval


def test_three_values() -> None:
    # Mean 3, standard deviation 2, t(0.975, 2) = 4.303: 4.303 * 2 / sqrt(3).
    made = interval([1.0, 3.0, 5.0])
    assert made.mean == 3
    assert made.half == pytest.approx(4.9687, abs=1e-3)
    assert made.low == pytest.approx(-1.9687, abs=1e-3)
    assert made.high == pytest.approx(7.9687, abs=1e-3)
    assert made.to_text() == "3.0 ± 5.0"
    assert made.to_text(signed=True) == "+3.0 ± 5.0"


def test_one_value_has_no_interval() -> None:
    made = interval([1.5])
    assert (made.mean, made.half, made.low, made.high) == (1.5, None, None, None)
    assert made.to_text() == "1.5"


def test_many_values_use_the_last_quantile() -> None:
    values = [float(number % 2) for number in range(100)]
    # Standard deviation sqrt(0.25 * 100 / 99).
    assert interval(values).half == pytest.approx(2.042 * (25 / 99) ** 0.5 / 10, abs=1e-6)
