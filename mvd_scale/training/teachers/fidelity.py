"""How true the features of a teacher in low precision are to those of the same one in float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mvd_scale.config import Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.load import teacher_input_sizes
from mvd_scale.training.placement import Placement, TeacherPlacement
from mvd_scale.training.teachers.place import cast_teacher

LEAST_COSINE = 0.999
"""Mean over tokens, under which a precision is not accepted without being asked for (`teachers.accept_inexact`)."""


@dataclass(frozen=True)
class Fidelity:
    """Of features to those in float32."""

    cosine: float
    """Mean over tokens."""

    relative_error: float
    """Norm of the difference by the norm of all features."""

    @classmethod
    def of(cls, features: Tensor, true: Tensor) -> Fidelity:
        """Compare (B, M, D) with the true ones."""
        features, true = features.float(), true.float()
        cosine = F.cosine_similarity(features, true, dim=-1).mean()
        return cls(float(cosine), float((features - true).norm() / true.norm()))


def check_fidelity(
    targets: Mapping[str, Target], recipe: Recipe, placement: Placement, manifest: Manifest, device: torch.device
) -> None:
    """Try every teacher that is to be in 8 bits on a clip of the run, before it is.

    Args:
        targets: with whole teachers on the CPU.
        recipe: the run's.
        placement: of the recipe.
        manifest: its videos.
        device: where teachers will run.

    Raises:
        UserError: features of a teacher have a mean cosine under `LEAST_COSINE` with the true ones.
    """
    eight_bit = {placed.name: placed for placed in placement.teachers if placed.precision.value in ("int8", "fp8")}
    if not eight_bit or recipe.teachers.accept_inexact:
        return
    clips = first_clip(targets, recipe, manifest, device)
    for name, placed in eight_bit.items():
        target = targets[name]
        assert isinstance(target, FrozenTeacher)
        fidelity = lowered(target, placed, clips, device)
        if not fidelity.cosine >= LEAST_COSINE:
            raise UserError(
                f"teachers.precision {placed.precision.value}: features of targets.{name} have a mean cosine of "
                f"{fidelity.cosine:.5f} with those in float32, less than {LEAST_COSINE}. Choose bf16 or fp16, or "
                "accept it with `--teachers.accept_inexact true`"
            )


def lowered(target: FrozenTeacher, placed: TeacherPlacement, clips: ClipBatch, device: torch.device) -> Fidelity:
    """Fidelity of a copy of a teacher in its placement's precision; the teacher itself stays in float32 on the CPU."""
    teacher = target.teacher
    try:
        target.teacher = copy.deepcopy(teacher).to(device, torch.float32)
        true = target.features(clips)
        target.teacher = cast_teacher(copy.deepcopy(teacher), placed, device)
        return Fidelity.of(target.features(clips), true)
    finally:
        target.teacher = teacher


def first_clip(targets: Mapping[str, Target], recipe: Recipe, manifest: Manifest, device: torch.device) -> ClipBatch:
    """A batch of one clip as the run sees them."""
    data = recipe.data.model_copy(update={"workers": 0})
    plan, sides = BatchPlan.one_batch(data.copies), teacher_input_sizes(recipe, targets)
    with ClipLoader(manifest, data, recipe.model, recipe.seed, plan=plan, rank=DataRank(device), sides=sides) as loader:
        return next(loader)
