"""Running mean and variance of a teacher's features, by which they are standardised (RADIO's balance of teachers).

Without it the teacher whose features have the largest variance rules a sum of distances: those of public models differ
a hundredfold. Features of a step are standardised by the statistics of the steps before it, which do not depend on how
the step is cut into ranks and micro batches; those of the first step by the statistics of their micro batch, of all
ranks. Nothing waits for the device but the first update.

Legend: D channels, L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

EPS = 1e-6
"""Added to a variance, as that of a channel may be 0."""

MOMENTUM = 0.99
"""Weight of the old moments in an update, where a recipe names none."""


class FeatureStatistics(nn.Module):
    """Running first and second moment of each channel, float64.

    Args:
        channels: channels of the features, L D.
        momentum: weight of the old moments in an update.
        layers: layers of the teacher that the channels are of, L.
        each_channel: divide each channel by its own deviation, otherwise all of a layer by one.
    """

    moments: Tensor
    """Means of values and of their squares, (2, L D)."""

    _sums: Tensor

    known = False
    """Whether the moments are of any features; equal on all ranks, and after a resumption."""

    def __init__(self, channels: int, momentum: float, *, layers: int, each_channel: bool) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("moments", torch.zeros(2, channels, dtype=torch.float64))
        self._layers, self._each_channel = layers, each_channel
        # Sums of values and of their squares since the last update, and the number of rows behind both.
        self.register_buffer("_sums", torch.zeros(2 * channels + 1, dtype=torch.float64))
        self.reduce: Callable[[Tensor], object] = _keep
        """Function that adds a tensor over all ranks, in place."""

    @torch.no_grad()
    def observe(self, features: Tensor) -> Tensor:
        """Take the features of a micro batch into the next update, and standardise them.

        All ranks must call it. Features of which any sum is not finite are not counted.

        Args:
            features: (B, M, L D), any floating dtype.

        Returns:
            float32 (B, M, L D).
        """
        sums = _sums_of(features.float().flatten(0, -2))
        sums = torch.where(torch.isfinite(sums).all(), sums, torch.zeros_like(sums))
        self._sums += sums
        if self.known:
            return self.standardize(features)
        self.reduce(sums)
        return self._standardized(features, _moments(sums))

    @torch.no_grad()
    def standardize(self, features: Tensor) -> Tensor:
        """Standardise features (..., L D) by the moments as they are: float32; unchanged while there are none."""
        return self._standardized(features, self.moments) if self.known else features.float()

    @torch.no_grad()
    def update(self) -> None:
        """Update the moments with all features since the last update. All ranks must call it, after each step that
        changed weights."""
        self.reduce(self._sums)
        # A step without any finite features does not count.
        weight = (1 - self.momentum if self.known else 1.0) * (self._sums[-1] > 0).double()
        self.moments.lerp_(_moments(self._sums), weight)
        self._sums.zero_()
        if not self.known:
            # This waits for the device. A choice on the device would have to sum each later micro batch over all ranks.
            self.restore()

    def discard(self) -> None:
        """Forget all features since the last update, of a step that changed no weight. All ranks must call it."""
        self._sums.zero_()

    def restore(self) -> None:
        """Take moments that were written into the tensor `moments`, such as those of a checkpoint."""
        self.known = bool(self.moments[1].any())

    def _standardized(self, features: Tensor, moments: Tensor) -> Tensor:
        mean, square = moments
        variance = (square - mean.square()).clamp(min=0).view(self._layers, -1)
        if not self._each_channel:
            variance = variance.mean(1, keepdim=True).expand_as(variance)
        scale = (variance.flatten() + EPS).rsqrt()
        # A float32 mean may be wrong by much of a deviation, its rest is not.
        nearest = mean.float()
        rest = (mean - nearest).float()
        return (features.float() - nearest).sub_(rest).mul_(scale.float())


def _sums_of(rows: Tensor) -> Tensor:
    """Sum values and squares of rows, float32 (R, D), with the number of rows behind both: float64 (2 D + 1,).

    Sums are of the differences from the mean in float32, whose squares do not cancel where it is much larger than the
    deviation.
    """
    count, pivot = len(rows), rows.mean(0)
    differences = rows - pivot
    first, second, pivot = differences.sum(0).double(), differences.square().sum(0).double(), pivot.double()
    squares = second + 2 * pivot * first + count * pivot.square()
    return torch.cat([first + count * pivot, squares, first.new_full((1,), count)])


def _moments(sums: Tensor) -> Tensor:
    """Divide sums (2 D + 1,), the last of which is the number of rows, into moments (2, D)."""
    return (sums[:-1] / sums[-1].clamp(min=1)).view(2, -1)


def _keep(tensor: Tensor) -> None:
    """Leave a tensor as it is: the sum over one rank."""
