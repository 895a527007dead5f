"""Training objective of action detection: binary cross entropy of every action of every person.

Legend: B clips, P people, C actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mvd_scale.data.batch import ClipBatch
from mvd_scale.detection.loader import DetectionBatch


class DetectionLoss:
    """Binary cross entropy: mean over actions, sum over the people of a clip, mean over clips.

    The published code takes the sum over the people of a rank's batch instead, so its loss grows with that batch. AdamW
    is invariant to a constant factor; with this normalisation every person has the same weight for any number of ranks.
    """

    parts = ("true_score",)
    teachers: Mapping[str, nn.Module] = MappingProxyType({})

    def __call__(self, engine: Any, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro batch, and the mean score of the true actions; float32 scalars."""
        assert isinstance(batch, DetectionBatch)
        scores = engine(batch.pixels, batch.boxes).float()
        clips, classes = len(batch.pixels), batch.actions.shape[1]
        loss = F.binary_cross_entropy_with_logits(scores, batch.actions, reduction="sum") / (clips * classes)
        done = batch.actions.sum().clamp(min=1)
        return loss, {"true_score": (scores.detach().sigmoid() * batch.actions).sum() / done}
