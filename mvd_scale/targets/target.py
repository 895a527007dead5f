"""h of Eq. 2: a function from clips to one feature per token.

Legend: B clips, N tokens, M tokens at which the target is predicted, D channels of the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvd_kernels import masked_distance
from mvd_scale.config.target import AnyTarget, TeacherTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Encoder
from mvd_scale.models.encoder import Patching


class Target(ABC):
    """A named term of Eq. 3."""

    channels: int
    """D, what the decoder must put out."""

    ahead = False
    """Whether features may be computed before their turn: they take their time, and no optimizer step changes them."""

    def __init__(self, config: AnyTarget) -> None:
        self.config = config

    @abstractmethod
    def raw(self, batch: ClipBatch) -> Tensor:
        """True features at the target's tokens, as `distance` takes them, without gradient: (B, M, D)."""

    def features(self, batch: ClipBatch) -> Tensor:
        """True features at the target's tokens, as the predictions should be: float32 (B, M, D)."""
        return self.raw(batch)

    def tokens(self, batch: ClipBatch) -> Tensor | None:
        """Where the target is predicted: int64 (B, M), or None for all tokens in order."""
        return batch.tokens(self.config.tokens)

    def distance(self, predictions: Tensor, raw: Tensor) -> Tensor:
        """Eq. 2: float32 scalar for predictions and raw features (B, M, D)."""
        return masked_distance(predictions, raw, None, distance=self.config.distance)


class FrozenTeacher(Target):
    """A target whose features come from a frozen model; it is never part of the student."""

    config: TeacherTarget
    ahead = True

    def __init__(self, config: TeacherTarget, teacher: nn.Module, channels: int, input_size: int) -> None:
        super().__init__(config)
        self.teacher = teacher.eval().requires_grad_(False)
        self.channels = channels
        self.input_size = input_size

    @abstractmethod
    def encode(self, batch: ClipBatch, tokens: Tensor | None) -> Tensor:
        """Features of some tokens, int64 (B, M), or of all in order: (B, M, D)."""

    @torch.no_grad()
    def raw(self, batch: ClipBatch) -> Tensor:
        """True features at the target's tokens, in the teacher's precision: (B, M, D)."""
        return self.encode(batch, self.tokens(batch))

    def features(self, batch: ClipBatch) -> Tensor:
        """The same, normalised if the recipe says so: float32 (B, M, D)."""
        features = self.raw(batch).float()
        return F.layer_norm(features, features.shape[-1:], eps=1e-6) if self.config.norm else features

    def distance(self, predictions: Tensor, raw: Tensor) -> Tensor:
        """Eq. 2: float32 scalar for predictions and raw features (B, M, D)."""
        return masked_distance(predictions, raw, None, distance=self.config.distance, norm=self.config.norm)


@dataclass(frozen=True)
class TubeRows:
    """Rows of the patch embedding of all tokens of the clips at one input side."""

    side: int
    patching: Patching

    def of(self, batch: ClipBatch) -> Tensor:
        """(B, N, t p p 3)."""
        return self.patching.rows(batch.at(self.side))


class EncoderTeacher(FrozenTeacher):
    """A teacher that is an encoder of ours; what is said here is of those that see the whole clip, unmasked."""

    takes_rows = True
    """Whether what is called in place of the encoder takes rows in place of pixels."""

    def __init__(self, config: TeacherTarget, encoder: Encoder, tubelet: int) -> None:
        """`tubelet`: frames of a student's token."""
        super().__init__(config, encoder, encoder.width, encoder.config.input_size)
        # `teacher` may become something else that calls it.
        self.encoder = encoder
        self.tubelet = tubelet
        self.extra_tokens = int(encoder.config.class_token)

    @property
    def tube_rows(self) -> TubeRows | None:
        """What it can take in place of pixels, and others perhaps too: rows of whole tubes, in its precision."""
        if not self.takes_rows:
            return None
        return TubeRows(self.input_size, replace(self.encoder.patching, tubelet=self.tubelet))

    @torch.no_grad()
    def raw(self, batch: ClipBatch, rows: Tensor | None = None) -> Tensor:
        """True features at the target's tokens, in the teacher's precision: (B, M, D).

        Args:
            batch: clips and tokens.
            rows: (B, N, t p p 3), what `tube_rows` makes of the batch, if that was done before.
        """
        return self.encode(batch, self.tokens(batch), rows)

    def encode(self, batch: ClipBatch, tokens: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Features of some tokens, or of all but a class token: (B, M, D). The last block computes no others."""
        given = {} if rows is None else {"rows": rows}
        features: Tensor = self.teacher(batch.at(self.input_size), kept=tokens, **given)
        return features if tokens is not None else features[:, self.extra_tokens :]
