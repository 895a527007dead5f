"""What `mvd-scale evaluate` and `mvd-scale predict` do alike: which views, and the scores of a view.

Legend: V views, T frames, S side of a crop, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mvd_scale.checkpoints import Checkpoint
from mvd_scale.config.data import TestViews, ViewsConfig
from mvd_scale.config.reading import describe
from mvd_scale.config.training import FrozenPrecision
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier
from mvd_scale.models.precision import lower

_VIEWS: TypeAdapter[ViewsConfig] = TypeAdapter(TestViews)


class Scorer:
    """A frozen classifier on its device and in its precision.

    Raises:
        UserError: the device lacks the precision, or weights are not finite.
    """

    def __init__(self, classifier: Classifier, device: torch.device, precision: FrozenPrecision) -> None:
        self.classifier = lower(classifier, precision, device)

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> Tensor:
        """Softmax of clips: uint8 (V, T, S, S, 3) to float32 (V, C)."""
        scores: Tensor = self.classifier(clips).float().softmax(1)
        return scores


def views_of(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> ViewsConfig:
    """The views that a checkpoint is tested by, or the published ones of Kinetics-400 if it tells none.

    Args:
        checkpoint: of a classifier.
        changes: fields of `ViewsConfig` that shall be otherwise.

    Raises:
        UserError: they are no views of a test.
    """
    try:
        return _VIEWS.validate_python((checkpoint.views or ViewsConfig()).model_dump() | dict(changes))
    except ValidationError as error:
        raise UserError(f"{checkpoint.source} cannot be tested by these views:\n{describe(error)}") from error
