"""Assembly of students and their targets into models in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mvd_scale.config import Recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.models import Student
from mvd_scale.targets import MaskedDistillation, Target
from mvd_scale.training.deepspeed_engine import train_engine
from mvd_scale.training.ema import build_momentum_emas, initialize_momentum_targets
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.optimizer import parameter_groups
from mvd_scale.training.placement import Placement
from mvd_scale.training.teachers.own_masks import StudentObjective
from mvd_scale.training.teachers.place import place_teachers
from mvd_scale.training.teachers.statistics import running_statistics
from mvd_scale.training.trained_model import MovingAverage, Objective, TrainedModel


@dataclass(frozen=True)
class StudentParts:
    """A student and its targets, before they move to their devices."""

    student: Student
    """Student on the CPU; momentum targets start from its encoder."""

    targets: Mapping[str, Target]
    """Targets by name, with unsharded teachers on the CPU; their teachers are replaced. Students may share teachers."""

    recipe: Recipe
    """Recipe of the student alone."""

    placement: Placement
    """Placement of that recipe on these ranks."""

    name: str = ""
    """Name of the student if there are several, else empty."""


def random_student(recipe: Recipe, targets: Mapping[str, Target]) -> Student:
    """Build a student with random weights, which depend on the seed and the shape of the student alone."""
    torch.manual_seed(recipe.seed)
    return Student.from_recipe(recipe, targets)


def distillation_models(parts: Sequence[StudentParts], ranks: Ranks, steps_per_epoch: int) -> list[TrainedModel]:
    """Move students and their teachers to their device, precision and shards. All ranks call it.

    Args:
        parts: each student with its targets; a teacher that several students share is moved once.
        ranks: this process among all.
        steps_per_epoch: optimizer steps of an epoch.

    Raises:
        UserError: see `train_engine` and `place_teachers`.
    """
    teachers: dict[nn.Module, nn.Module] = {}
    for part in parts:
        initialize_momentum_targets(part.targets, part.student)
        place_teachers(part.targets, part.placement, ranks, teachers)
    return [_trained(part, ranks, steps_per_epoch) for part in parts]


def _trained(part: StudentParts, ranks: Ranks, steps_per_epoch: int) -> TrainedModel:
    training, targets = part.recipe.training, part.targets
    schedule = Schedule(training, steps_per_epoch, part.recipe.lr_batch)
    groups = parameter_groups(part.student, training.weight_decay, decay_tokens=training.decay_tokens)
    engine = train_engine(part.student, groups, part.recipe, part.placement, ranks)
    averages: list[MovingAverage] = [
        *build_momentum_emas(targets, engine, schedule, ranks),
        *running_statistics(targets, ranks),
    ]
    objective: Objective = MaskedDistillation(targets)
    if part.name:
        objective = StudentObjective(MaskedDistillation(targets), part.name)
    return TrainedModel(engine, objective, schedule, averages, part.name)
