"""h of Eq. 2: a function from clips to one feature per token.

Legend: B clips, N tokens, M tokens at which the target is predicted, D channels of the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvd_kernels import masked_distance
from mvd_scale.config.target import AnyTarget, TeacherTarget
from mvd_scale.data.batch import ClipBatch


class Target(ABC):
    """A named term of Eq. 3."""

    channels: int
    """D, what the decoder must put out."""

    def __init__(self, config: AnyTarget) -> None:
        self.config = config

    @abstractmethod
    def features(self, batch: ClipBatch) -> Tensor:
        """True features at the target's tokens, as the predictions should be: (B, M, D)."""

    def tokens(self, batch: ClipBatch) -> Tensor | None:
        """Where the target is predicted: int64 (B, M), or None for all tokens in order."""
        return batch.tokens(self.config.tokens)

    def distance(self, predictions: Tensor, batch: ClipBatch) -> Tensor:
        """Eq. 2: float32 scalar for predictions (B, M, D)."""
        return masked_distance(predictions, self.features(batch), None, distance=self.config.distance)


class FrozenTeacher(Target):
    """A target whose features come from a frozen model; it is never part of the student."""

    config: TeacherTarget

    def __init__(self, config: TeacherTarget, teacher: nn.Module, channels: int, input_size: int) -> None:
        super().__init__(config)
        self.teacher = teacher.eval().requires_grad_(False)
        self.channels = channels
        self.input_size = input_size

    @abstractmethod
    def encode(self, batch: ClipBatch, tokens: Tensor | None) -> Tensor:
        """Features of some tokens, int64 (B, M), or of all in order: (B, M, D)."""

    @torch.no_grad()
    def features(self, batch: ClipBatch) -> Tensor:
        """True features at the target's tokens, normalised if the recipe says so: float32 (B, M, D)."""
        features = self.encode(batch, self.tokens(batch)).float()
        return F.layer_norm(features, features.shape[-1:], eps=1e-6) if self.config.norm else features

    def distance(self, predictions: Tensor, batch: ClipBatch) -> Tensor:
        """Eq. 2: float32 scalar for predictions (B, M, D)."""
        with torch.no_grad():
            features = self.encode(batch, self.tokens(batch))
        return masked_distance(predictions, features, None, distance=self.config.distance, norm=self.config.norm)
