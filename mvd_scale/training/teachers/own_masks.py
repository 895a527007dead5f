"""Masks of their own for students of one run: each sees its tokens, of features that are computed at all tokens once.

Legend: B clips, N tokens, M tokens at which a target is predicted, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mvd_scale.data.batch import ClipBatch
from mvd_scale.models.blocks import select_output_tokens

if TYPE_CHECKING:
    from mvd_scale.targets import MaskedDistillation


class StudentObjective:
    """Loss of one of several students on the batch that it would have alone.

    Args:
        objective: loss of the student.
        name: name of the student.
    """

    def __init__(self, objective: MaskedDistillation, name: str) -> None:
        self.objective = objective
        self.name = name

    @property
    def parts(self) -> list[str]:
        """Names of the targets, see `MaskedDistillation.parts`."""
        return self.objective.parts

    @property
    def teachers(self) -> Mapping[str, nn.Module]:
        """Frozen models that the objective calls, by the name of their target."""
        return self.objective.teachers

    def __call__(self, engine: Any, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one micro batch of all students, see `MaskedDistillation`."""
        return self.objective(engine, self._own(batch))

    def _own(self, batch: ClipBatch) -> ClipBatch:
        """Batch with the student's mask, and with features at the tokens of its targets: (B, M, D) each."""
        if not batch.own_visible:
            return batch
        own = batch.seen_by(self.name)
        targets = self.objective.targets
        features = {
            name: select_output_tokens(features, targets[name].tokens(own))
            for name, features in batch.features.items()
            if name in targets
        }
        return replace(own, features=features)


def at_all_tokens(teach: Callable[[ClipBatch], ClipBatch], tokens: int) -> Callable[[ClipBatch], ClipBatch]:
    """Change a function that adds teacher features to a batch: to features at all tokens, (B, N, D).

    Args:
        teach: function that adds features at the tokens of the targets.
        tokens: number of tokens of a clip, N.
    """

    def teach_all(batch: ClipBatch) -> ClipBatch:
        return replace(batch, features=teach(batch.unmasked(tokens)).features)

    return teach_all
