"""Features as colours: their first three principal components as red, green and blue.

Legend: n features, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrincipalColors:
    """Map from features to colours; one map shows the same component in the same colour in every picture."""

    mean: Tensor
    """(D,)."""

    axes: Tensor
    """First three principal components, (D, 3). The largest entry of each is positive, so that signs are no chance."""

    low: Tensor
    """Projection that becomes 0, (3,): the 1st percentile of the features of the fit."""

    high: Tensor
    """Projection that becomes 1, (3,): the 99th percentile."""

    @classmethod
    def fit(cls, features: Tensor) -> Self:
        """Fit the map to float32 features (n, D) of at least three channels."""
        mean = features.mean(0)
        # Eigenvalues ascend, so the last three axes are the first components. Not `pca_lowrank`, whose random start
        # would advance the random generator of the training.
        _, axes = torch.linalg.eigh(torch.cov(features.T))
        axes = axes[:, -3:].flip(1)
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        low, high = ((features - mean) @ axes).quantile(torch.tensor([0.01, 0.99], device=features.device), dim=0)
        return cls(mean, axes, low, high)

    def __call__(self, features: Tensor) -> Tensor:
        """Map features (..., D) to colours (..., 3) in 0..1."""
        spread = (self.high - self.low).clamp_min(1e-12)
        return (((features - self.mean) @ self.axes - self.low) / spread).clamp(0, 1)
