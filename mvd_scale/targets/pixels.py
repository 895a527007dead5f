"""Pixel targets: the reconstruction target of MAE and VideoMAE, and the pixel branch of Table 7."""

from __future__ import annotations

from torch import Tensor

from mvd_kernels import tube_targets
from mvd_scale.config import ModelConfig, PixelTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.targets.target import Target


class Pixels(Target):
    """Target of t p p 3 values per token in the order (frame, row, column, channel), normalised within the token if the
    recipe states `normalize`."""

    config: PixelTarget

    def __init__(self, config: PixelTarget, model: ModelConfig) -> None:
        super().__init__(config)
        self.model = model
        self.channels = model.tubelet * model.patch_size**2 * 3

    def raw_features(self, batch: ClipBatch) -> Tensor:
        """Return the pixels of the target's tokens: float32 (B, M, t p p 3)."""
        return tube_targets(
            batch.pixels,
            self.tokens(batch),
            tubelet=self.model.tubelet,
            patch=self.model.patch_size,
            normalize=self.config.normalize,
        )
