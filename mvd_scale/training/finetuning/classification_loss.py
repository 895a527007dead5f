"""Training objective of classification: cross entropy with label smoothing and mixed labels.

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
from mvd_scale.training.finetuning.mixup import mix_clips, soft_labels


class ClassificationLoss:
    """Cross entropy of the class scores of clips."""

    parts = ("accuracy",)
    teachers: Mapping[str, nn.Module] = MappingProxyType({})

    def __init__(self, recipe: FinetuneRecipe, classes: int) -> None:
        self.mix = recipe.mix
        self.smoothing = recipe.classifier.label_smoothing
        self.classes = classes

    def __call__(self, engine: Any, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and accuracy of a micro batch, float32 scalars.

        After mixing, the label of the larger weight counts for the accuracy.
        """
        targets = soft_labels(batch.labels, self.classes, self.smoothing)
        pixels = batch.pixels
        if self.mix is not None:
            pixels, targets = mix_clips(pixels, targets, self.mix)
        scores = engine(pixels).float()
        loss = F.cross_entropy(scores, targets)
        accuracy = (scores.detach().argmax(1) == targets.argmax(1)).float().mean()
        return loss, {"accuracy": accuracy}
