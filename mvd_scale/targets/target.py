"""Targets: functions from clips to one feature vector per token (h of Eq. 2).

Legend: B clips, N tokens, M tokens at which the target is predicted, D channels of the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvd_kernels import masked_distance
from mvd_scale.config.target import BaseTarget, TeacherTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Encoder
from mvd_scale.models.blocks import select_output_tokens
from mvd_scale.models.encoder import Patchify
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets.resampling import GridResampler
from mvd_scale.targets.statistics import MOMENTUM, FeatureStatistics


class Target(ABC):
    """One term of Eq. 3: the features to predict and their distance from the predictions."""

    channels: int
    """D: output channels that the decoder needs."""

    prefetchable = False
    """Whether features may be computed one step in advance: they are costly and no optimizer step changes them."""

    def __init__(self, config: BaseTarget) -> None:
        self.config = config

    @abstractmethod
    def raw_features(self, batch: ClipBatch) -> Tensor:
        """Compute the features at the target's tokens in the form that `distance` expects, no gradient: (B, M, D)."""

    def features(self, batch: ClipBatch) -> Tensor:
        """Compute the features that the predictions should equal, at the target's tokens: float32 (B, M, D)."""
        return self.raw_features(batch)

    def tokens(self, batch: ClipBatch) -> Tensor | None:
        """Return the tokens at which the target is predicted: int64 (B, M), or None for all tokens in order.

        With `visible_weight` they are the visible tokens, then the masked ones. Of an unmasked batch they are all.
        """
        if self.config.visible_weight and not batch.is_unmasked:
            return torch.cat([batch.visible, batch.masked], dim=1)
        return batch.tokens(self.config.tokens)

    def loss(self, predictions: Tensor, raw_features: Tensor, batch: ClipBatch) -> Tensor:
        """Compute the distance of Eq. 2 at the target's tokens, both (B, M, D): float32 scalar.

        With `visible_weight` it is the distance at masked tokens, plus so many times that at visible tokens.
        """
        weight = self.config.visible_weight
        if not weight:
            return self.distance(predictions, raw_features)
        counts = [batch.visible.shape[1], batch.masked.shape[1]]
        visible, masked = zip(predictions.split(counts, dim=1), raw_features.split(counts, dim=1), strict=True)
        return self.distance(*masked) + weight * self.distance(*visible)

    def distance(self, predictions: Tensor, raw_features: Tensor) -> Tensor:
        """Compute the distance of Eq. 2 between predictions and raw features, both (B, M, D): float32 scalar."""
        return masked_distance(predictions, raw_features, None, distance=self.config.distance)


class FrozenTeacher(Target):
    """Target whose features a frozen model computes; the model is not a submodule of the student."""

    config: TeacherTarget
    prefetchable = True

    statistics: FeatureStatistics | None = None
    """Running mean and variance by which features are standardised; None if they are not."""

    resampler: GridResampler | None = None
    """Resampler of features from the teacher's token grid to the student's; None if the grids agree."""

    def __init__(self, config: TeacherTarget, teacher: Encoder | TimmViT, input_size: int) -> None:
        super().__init__(config)
        teacher.layers = config.layers
        self.teacher: nn.Module = teacher.eval().requires_grad_(False)
        layers = max(len(config.layers), 1)
        self.channels = teacher.width * layers
        self.input_size = input_size
        if config.standardize != "none":
            momentum = MOMENTUM if config.standardize_momentum is None else config.standardize_momentum
            each = config.standardize == "channel"
            self.statistics = FeatureStatistics(self.channels, momentum, layers=layers, each_channel=each)

    def select(self, features: Tensor, tokens: Tensor | None) -> Tensor:
        """Select features at the student's tokens.

        Args:
            features: (B, N, D) at all tokens of the teacher's grid, without a class token.
            tokens: int64 (B, M) in the student's grid, or None for all tokens in order.

        Returns:
            (B, M, D).
        """
        return select_output_tokens(features if self.resampler is None else self.resampler(features), tokens)

    @abstractmethod
    def encode(self, batch: ClipBatch, tokens: Tensor | None) -> Tensor:
        """Compute features at the tokens int64 (B, M), or at all tokens in order if None: (B, M, D)."""

    @torch.no_grad()
    def raw_features(self, batch: ClipBatch) -> Tensor:
        """Compute the features at the target's tokens, in the teacher's dtype: (B, M, D)."""
        return self.encode(batch, self.tokens(batch))

    def features(self, batch: ClipBatch) -> Tensor:
        """Compute the features at the target's tokens, normalised or standardised if the recipe says so.

        Returns:
            float32 (B, M, D).
        """
        features = self.raw_features(batch).float()
        if self.statistics is not None:
            return self.statistics.standardize(features)
        if not self.config.norm:
            return features
        by_layer = self._by_layer(features)
        return F.layer_norm(by_layer, by_layer.shape[-1:], eps=1e-6).view_as(features)

    def distance(self, predictions: Tensor, raw_features: Tensor) -> Tensor:
        """Compute the distance of Eq. 2 between predictions and raw features, both (B, M, D): float32 scalar.

        Norm and distance are those of the features of each layer, whose mean it is.
        """
        guess, truth = self._by_layer(predictions), self._by_layer(raw_features)
        return masked_distance(guess, truth, None, distance=self.config.distance, norm=self.config.norm)

    def loss(self, predictions: Tensor, raw_features: Tensor, batch: ClipBatch) -> Tensor:
        """See `Target.loss`. Each call counts in the statistics of the features, if they are standardised."""
        if self.statistics is not None:
            raw_features = self.statistics.observe(raw_features)
        return super().loss(predictions, raw_features, batch)

    def _by_layer(self, values: Tensor) -> Tensor:
        """Take the channels of each of L layers as a row of its own: (B, M, L D) to (B, M L, D)."""
        layers = len(self.config.layers)
        return values if layers < 2 else values.unflatten(-1, (layers, -1)).flatten(1, 2)


@dataclass(frozen=True)
class PatchRowsKey:
    """Key of the rows of a patch embedding: two teachers with equal keys can share the rows."""

    side: int
    patchify: Patchify

    def of(self, batch: ClipBatch) -> Tensor:
        """Compute the rows of all tokens of a batch at the input side `side`: (B, N, t p p 3)."""
        return self.patchify.rows(batch.at(self.side))


class EncoderTeacher(FrozenTeacher):
    """Teacher that is an `Encoder`. The methods here are for teachers that see the whole, unmasked clip."""

    accepts_rows = True
    """Whether `teacher`, which may be a wrapper of the encoder, accepts the argument `rows` in place of pixels."""

    def __init__(self, config: TeacherTarget, encoder: Encoder, tubelet: int) -> None:
        """Build the target.

        Args:
            config: settings of the target.
            encoder: the frozen encoder.
            tubelet: frames of one token of the student.
        """
        super().__init__(config, encoder, encoder.config.input_size)
        # `teacher` may be replaced by a wrapper, such as a CUDA graph; `encoder` stays the module itself.
        self.encoder = encoder
        self.tubelet = tubelet
        self.extra_tokens = int(encoder.config.class_token)

    @property
    def rows_key(self) -> PatchRowsKey | None:
        """Key of the rows of whole tubelets that the teacher accepts in place of pixels; None if it accepts none."""
        if not self.accepts_rows:
            return None
        return PatchRowsKey(self.input_size, replace(self.encoder.patchify, tubelet=self.tubelet))

    @torch.no_grad()
    def raw_features(self, batch: ClipBatch, rows: Tensor | None = None) -> Tensor:
        """Compute the features at the target's tokens, in the teacher's dtype: (B, M, D).

        Args:
            batch: clips and tokens.
            rows: (B, N, t p p 3), result of `rows_key.of(batch)` if it was already computed.
        """
        return self.encode(batch, self.tokens(batch), rows)

    def encode(self, batch: ClipBatch, tokens: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Compute features at the tokens int64 (B, M), or at all tokens but a class token if None: (B, M, D).

        The teacher's last block computes only these tokens.
        """
        given = {} if rows is None else {"rows": rows}
        features: Tensor = self.teacher(batch.at(self.input_size), output_tokens=tokens, **given)
        return features if tokens is not None else features[:, self.extra_tokens :]
