"""Choice of views and scoring of clips, common to `mvd-scale evaluate` and `mvd-scale predict`.

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
from mvd_scale.config.reading import format_validation_error
from mvd_scale.config.training import FrozenPrecision
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier
from mvd_scale.models.precision import cast_frozen

_VIEWS: TypeAdapter[ViewsConfig] = TypeAdapter(TestViews)


class ClipScorer:
    """Frozen classifier on a device and in a precision.

    Raises:
        UserError: the device does not support the precision, or weights are not finite.
    """

    def __init__(self, classifier: Classifier, device: torch.device, precision: FrozenPrecision) -> None:
        self.classifier = cast_frozen(classifier, precision, device)

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> Tensor:
        """Compute softmax scores of clips: uint8 (V, T, S, S, 3) to float32 (V, C)."""
        scores: Tensor = self.classifier(clips).float().softmax(1)
        return scores


def views_from_checkpoint(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> ViewsConfig:
    """Return the views stored in a checkpoint, or those published for Kinetics-400 if it contains none.

    Args:
        checkpoint: checkpoint of a classifier.
        changes: fields of `ViewsConfig` to replace.

    Raises:
        UserError: the resulting views are not valid.
    """
    try:
        return _VIEWS.validate_python((checkpoint.views or ViewsConfig()).model_dump() | dict(changes))
    except ValidationError as error:
        raise UserError(
            f"{checkpoint.source} cannot be evaluated with these views:\n{format_validation_error(error)}"
        ) from error
