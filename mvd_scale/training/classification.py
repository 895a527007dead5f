"""What fine-tuning minimises: cross entropy with smoothed and mixed labels.

Legend: B clips, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mvd_scale.config import FinetuneRecipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.training.mixing import mix_clips, soft_labels


class Classification:
    """Cross entropy of the scores of whole clips."""

    parts = ("accuracy",)
    teachers: Mapping[str, nn.Module] = MappingProxyType({})

    def __init__(self, recipe: FinetuneRecipe, classes: int) -> None:
        self.mix = recipe.mix
        self.smoothing = recipe.classifier.label_smoothing
        self.classes = classes

    def __call__(self, engine: Any, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro batch, and the share of clips whose (stronger) label has the highest score; float32."""
        targets = soft_labels(batch.labels, self.classes, self.smoothing)
        pixels = batch.pixels
        if self.mix is not None:
            pixels, targets = mix_clips(pixels, targets, self.mix)
        scores = engine(pixels).float()
        loss = F.cross_entropy(scores, targets)
        accuracy = (scores.detach().argmax(1) == targets.argmax(1)).float().mean()
        return loss, {"accuracy": accuracy}
