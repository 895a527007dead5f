"""The training objective: the weighted sum of distances over targets (Eq. 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from mvd_scale.data.batch import ClipBatch
from mvd_scale.targets.target import EncoderTeacher, FrozenTeacher, PatchRowsKey, Target

Predictions = dict[str, Tensor]


class MaskedDistillation:
    """The paper's Algorithm 1 from the loaded batch to the loss, before `backward`."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets = targets

    @property
    def parts(self) -> list[str]:
        """Names of the targets, in the order in which their distances are reported."""
        return list(self.targets)

    @property
    def teachers(self) -> dict[str, nn.Module]:
        """Frozen models that the objective calls, by the name of their target."""
        return {name: target.teacher for name, target in self.targets.items() if isinstance(target, FrozenTeacher)}

    def prefetch_features(self, batch: ClipBatch) -> ClipBatch:
        """Return the batch with the features of all targets that may be computed before the step that uses them."""
        early = [name for name, target in self.targets.items() if target.prefetchable]
        return replace(batch, features=self._raw(batch, early))

    def __call__(self, student: nn.Module, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one micro batch; features that the batch does not contain are computed here.

        Args:
            student: maps pixels, visible and masked tokens to {target name: (B, M, D)}.
            batch: clips, masks and any features that were computed in advance.

        Returns:
            the weighted sum of Eq. 3, and the unweighted, detached distance of each target; float32 scalars.
        """
        predictions: Predictions = student(batch.pixels, batch.visible, batch.masked)
        missing = [name for name in self.targets if name not in batch.features]
        features = {**batch.features, **self._raw(batch, missing)}
        distances = {
            name: target.loss(predictions[name], features[name], batch) for name, target in self.targets.items()
        }
        loss = sum(self.targets[name].config.weight * distance for name, distance in distances.items())
        assert isinstance(loss, Tensor)
        return loss, {name: distance.detach() for name, distance in distances.items()}

    def _raw(self, batch: ClipBatch, names: Iterable[str]) -> dict[str, Tensor]:
        """Compute the features of some targets by name: (B, M, D) each.

        Teachers with the same patches and input side need the same rows of the patch embedding. Rows that more than one
        teacher needs are computed once.
        """
        targets = {name: self.targets[name] for name in names}
        encoder_teachers = {name: target for name, target in targets.items() if isinstance(target, EncoderTeacher)}
        uses = Counter(teacher.rows_key for teacher in encoder_teachers.values())
        shared: dict[PatchRowsKey | None, Tensor] = {
            rows: rows.of(batch) for rows, count in uses.items() if rows is not None and count > 1
        }
        features = {
            name: teacher.raw_features(batch, shared.get(teacher.rows_key))
            for name, teacher in encoder_teachers.items()
        }
        return features | {
            name: target.raw_features(batch) for name, target in targets.items() if name not in encoder_teachers
        }
