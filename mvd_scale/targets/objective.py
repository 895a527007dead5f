"""The training objective: the weighted sum of distances over targets (Eq. 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from mvd_scale.config import ImageTeacherTarget, MomentumTarget, PixelTarget, Recipe, TimmTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Encoder
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets.image_teacher import ImageTeacher
from mvd_scale.targets.momentum import Momentum
from mvd_scale.targets.pixels import Pixels
from mvd_scale.targets.target import EncoderTeacher, Target, TubeRows
from mvd_scale.targets.timm_teacher import TimmTeacher
from mvd_scale.targets.video_teacher import VideoTeacher

Predictions = dict[str, Tensor]


def build_targets(recipe: Recipe, load_teacher: Callable[[str], Encoder | TimmViT]) -> dict[str, Target]:
    """Build the targets of a recipe by name.

    Args:
        recipe: states the targets, the student's shape and the masking.
        load_teacher: returns the frozen model for the name of a target.

    Raises:
        UserError: a teacher does not fit the student's token grid.
    """
    targets: dict[str, Target] = {}
    mask = recipe.data.mask
    tubes = mask is not None and mask.kind == "tube" and mask.decode == 1
    for name, config in recipe.targets.items():
        if isinstance(config, PixelTarget):
            targets[name] = Pixels(config, recipe.model)
            continue
        teacher = load_teacher(name)
        if isinstance(config, TimmTarget):
            assert isinstance(teacher, TimmViT)
            targets[name] = TimmTeacher(name, config, teacher, recipe.model)
            continue
        assert isinstance(teacher, Encoder)
        if isinstance(config, MomentumTarget):
            targets[name] = Momentum(config, teacher, recipe.model.tubelet)
        elif isinstance(config, ImageTeacherTarget):
            targets[name] = ImageTeacher(name, config, teacher, recipe.model, tubes=tubes)
        else:
            targets[name] = VideoTeacher(name, config, teacher, recipe.model)
    return targets


class MaskedDistillation:
    """The paper's Algorithm 1 from the loaded batch to the loss, before `backward`."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets = targets

    @property
    def parts(self) -> list[str]:
        """Names of the targets, in the order in which their distances are reported."""
        return list(self.targets)

    def ahead(self, batch: ClipBatch) -> ClipBatch:
        """Return the batch with the features of all targets that may be computed before the step that uses them."""
        early = [name for name, target in self.targets.items() if target.ahead]
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
        distances = {name: target.distance(predictions[name], features[name]) for name, target in self.targets.items()}
        loss = sum(self.targets[name].config.weight * distance for name, distance in distances.items())
        assert isinstance(loss, Tensor)
        return loss, {name: distance.detach() for name, distance in distances.items()}

    def _raw(self, batch: ClipBatch, names: Iterable[str]) -> dict[str, Tensor]:
        """Compute the features of some targets by name: (B, M, D) each.

        Teachers with the same patches and input side need the same rows of the patch embedding. Rows that more than one
        teacher needs are computed once.
        """
        targets = {name: self.targets[name] for name in names}
        takers = {name: target for name, target in targets.items() if isinstance(target, EncoderTeacher)}
        wanted = Counter(taker.tube_rows for taker in takers.values())
        shared: dict[TubeRows | None, Tensor] = {
            rows: rows.of(batch) for rows, count in wanted.items() if rows is not None and count > 1
        }
        taken = {name: taker.raw(batch, shared.get(taker.tube_rows)) for name, taker in takers.items()}
        return taken | {name: target.raw(batch) for name, target in targets.items() if name not in takers}
