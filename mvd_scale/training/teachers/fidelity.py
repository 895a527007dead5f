"""Fidelity of a teacher's features in 8-bit precision, relative to its features in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
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
"""Smallest mean cosine over tokens at which a precision is accepted without `teachers.accept_inexact`."""


@dataclass(frozen=True)
class Fidelity:
    """Agreement of features with the float32 features of the same teacher."""

    cosine: float
    """Mean cosine over tokens."""

    relative_error: float
    """Norm of the difference divided by the norm of the float32 features."""

    @classmethod
    def of(cls, features: Tensor, true: Tensor) -> Fidelity:
        """Compare features with float32 features of the same shape, (B, M, D)."""
        features, true = features.float(), true.float()
        cosine = F.cosine_similarity(features, true, dim=-1).mean()
        return cls(float(cosine), float((features - true).norm() / true.norm()))


def check_fidelity(
    targets: Mapping[str, Target],
    recipe: Recipe,
    placements: Iterable[Placement],
    manifest: Manifest,
    device: torch.device,
) -> None:
    """Check the features of every teacher that will be quantized to 8 bits on one clip of the run.

    Args:
        targets: targets of all students by name, with unsharded teachers on the CPU.
        recipe: recipe of the run.
        placements: placement of each student; a teacher that several students share is placed alike for all.
        manifest: videos of the run.
        device: device that the teachers will run on.

    Raises:
        UserError: the mean cosine of a teacher's features with its float32 features is below `LEAST_COSINE`, and
            `teachers.accept_inexact` is false.
    """
    placed_teachers = (placed for placement in placements for placed in placement.teachers)
    eight_bit = {placed.name: placed for placed in placed_teachers if placed.precision.value in ("int8", "fp8")}
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
                "accept this precision with `--teachers.accept_inexact true`"
            )


def lowered(target: FrozenTeacher, placed: TeacherPlacement, clips: ClipBatch, device: torch.device) -> Fidelity:
    """Measure the fidelity of a copy of a teacher in its placement's precision; the teacher itself does not change."""
    teacher = target.teacher
    try:
        target.teacher = copy.deepcopy(teacher).to(device, torch.float32)
        true = target.features(clips)
        target.teacher = cast_teacher(copy.deepcopy(teacher), placed, device)
        return Fidelity.of(target.features(clips), true)
    finally:
        target.teacher = teacher


def first_clip(targets: Mapping[str, Target], recipe: Recipe, manifest: Manifest, device: torch.device) -> ClipBatch:
    """Load the first clip of the run, with all of its copies, as one batch on `device`."""
    data = recipe.data.model_copy(update={"workers": 0})
    plan, sides = BatchPlan.one_batch(data.copies), teacher_input_sizes(recipe, targets)
    with ClipLoader(manifest, data, recipe.model, recipe.seed, plan=plan, rank=DataRank(device), sides=sides) as loader:
        return next(loader)
