"""Running mean and variance of a teacher's features, by which they are standardised (RADIO's balance of teachers).

Without it the teacher whose features have the largest variance rules a sum of distances: those of public models differ
a hundredfold. Features of a step are standardised by the statistics of the steps before it, which do not depend on how
the step is cut into ranks and micro batches; those of the first step by the statistics of their micro batch, of all
ranks. Nothing waits for the device.

Legend: D channels, L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

EPS = 1e-6
"""Added to a variance, as that of a channel may be 0."""


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
    """Whether the moments are of any features."""

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
        rows = features.float().flatten(0, -2)
        sums = torch.cat([rows.sum(0), rows.square().sum(0), rows.new_full((1,), len(rows))]).double()
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
        """Update the moments with all features since the last update. All ranks must call it, after each step."""
        self.reduce(self._sums)
        # A step without any finite features does not count.
        weight = (1 - self.momentum if self.known else 1.0) * (self._sums[-1] > 0).double()
        self.moments.lerp_(_moments(self._sums), weight)
        self._sums.zero_()
        self.known = True

    def restore(self) -> None:
        """Take moments that were written into the tensor `moments`, such as those of a checkpoint."""
        self.known = bool(self.moments[1].any())

    def _standardized(self, features: Tensor, moments: Tensor) -> Tensor:
        mean, square = moments
        variance = (square - mean.square()).clamp(min=0).view(self._layers, -1)
        if not self._each_channel:
            variance = variance.mean(1, keepdim=True).expand_as(variance)
        scale = (variance.flatten() + EPS).rsqrt()
        return (features.float() - mean.float()) * scale.float()


def _moments(sums: Tensor) -> Tensor:
    """Divide sums (2 D + 1,), the last of which is the number of rows, into moments (2, D)."""
    return (sums[:-1] / sums[-1].clamp(min=1)).view(2, -1)


def _keep(tensor: Tensor) -> None:
    """Leave a tensor as it is: the sum over one rank."""
