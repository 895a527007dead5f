"""Bootstrapped targets: features of a moving average of the student's own encoder (Table 8)."""

from __future__ import annotations

from torch import Tensor

from mvd_scale.config import MomentumTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Encoder
from mvd_scale.targets.target import FrozenTeacher


class Momentum(FrozenTeacher):
    """The average sees the whole clip, unmasked. `training.momentum` moves it after every optimizer step."""

    encoder: Encoder
    """The average; inside of `teacher` once that is sharded."""

    config: MomentumTarget
    # The next step's average is not there yet.
    ahead = False

    def __init__(self, config: MomentumTarget, average: Encoder) -> None:
        super().__init__(config, average, average.width, average.config.input_size)
        self.encoder = average
        self.extra_tokens = int(average.config.class_token)

    def encode(self, batch: ClipBatch, tokens: Tensor | None) -> Tensor:
        """Features of some tokens, or of all but a class token: (B, M, D)."""
        features: Tensor = self.teacher(batch.at(self.input_size), kept=tokens)
        return features if tokens is not None else features[:, self.extra_tokens :]
