"""The pixels of a token: what MAE and VideoMAE reconstruct, and the pixel branch of Table 7."""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_kernels import tube_pixels
from mvd_scale.config import ModelConfig, PixelTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from mvd_scale.targets.target import Target


class Pixels(Target):
    """t p p 3 values per token in the order (frame, row, column, channel), normalised within the token."""

    config: PixelTarget

    def __init__(self, config: PixelTarget, model: ModelConfig) -> None:
        super().__init__(config)
        self.model = model
        self.channels = model.tubelet * model.patch_size**2 * 3

    def features(self, batch: ClipBatch) -> Tensor:
        """Pixels at the target's tokens: float32 (B, M, t p p 3)."""
        pixels = tube_pixels(batch.pixels, self.tokens(batch), tubelet=self.model.tubelet, patch=self.model.patch_size)
        if self.config.normalize == "channel":
            # VideoMAE: every colour of a tube by its own mean and unbiased deviation.
            variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
            pixels = (pixels - mean) / (variance.sqrt() + 1e-6)
        elif self.config.normalize == "patch":
            # MAE: all values of a patch together, after the colours were whitened by ImageNet's statistics.
            pixels = self._whiten(pixels)
            variance, mean = torch.var_mean(pixels, dim=(2, 3), keepdim=True)
            pixels = (pixels - mean) / (variance + 1e-6).sqrt()
        return pixels.flatten(2)

    @staticmethod
    def _whiten(pixels: Tensor) -> Tensor:
        channels = zip(pixels.unbind(-1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=-1)
