"""Intervals of means over seeds, by Student's t distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """Mean of independent values, one for each seed, with the 95 % interval of the mean."""

    mean: float

    half: float | None
    """Half of the width of the interval; None for one value, which has none."""

    count: int
    """Number of values."""

    @property
    def low(self) -> float | None:
        """Lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end."""
        return None if self.half is None else self.mean + self.half

    def to_text(self, *, signed: bool = False) -> str:
        """In the unit of the values, with one digit."""
        mean = f"{self.mean:+.1f}" if signed else f"{self.mean:.1f}"
        return mean if self.half is None else f"{mean} ± {self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean of values and t(0.975, n - 1) x s / sqrt(n), where s is their standard deviation by n - 1.

    For more than 31 values the quantile of 30 degrees of freedom is used, which is slightly wide.

    Args:
        values: one value for each seed, at least one.
    """
    count = len(values)
    if count == 1:
        return Interval(values[0], None, 1)
    quantile = _T_975[min(count - 1, len(_T_975)) - 1]
    return Interval(fmean(values), quantile * stdev(values) / sqrt(count), count)
