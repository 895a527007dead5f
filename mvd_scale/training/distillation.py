"""Assembly of a student and its targets into a model in training."""

from __future__ import annotations

from collections.abc import Mapping

from mvd_scale.config import Recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.models import Student
from mvd_scale.targets import MaskedDistillation, Target
from mvd_scale.training.deepspeed_engine import train_engine
from mvd_scale.training.ema import build_momentum_emas, initialize_momentum_targets
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.optimizer import parameter_groups
from mvd_scale.training.placement import Placement
from mvd_scale.training.teachers.place import place_teachers
from mvd_scale.training.trainer import TrainedModel


def distillation_model(
    student: Student,
    targets: Mapping[str, Target],
    recipe: Recipe,
    placement: Placement,
    ranks: Ranks,
    schedule: Schedule,
) -> TrainedModel:
    """Move a student and its teachers to their device, precision and shards. All ranks call it.

    Args:
        student: student on the CPU; momentum targets start from its encoder.
        targets: targets by name, with unsharded teachers on the CPU; their teachers are replaced.
        recipe: recipe of the run.
        placement: placement of the recipe on these ranks.
        ranks: this process among all.
        schedule: schedule of the run.

    Raises:
        UserError: see `train_engine` and `place_teachers`.
    """
    initialize_momentum_targets(targets, student)
    place_teachers(targets, placement, ranks)
    training = recipe.training
    groups = parameter_groups(student, training.weight_decay, decay_tokens=training.decay_tokens)
    engine = train_engine(student, groups, recipe, placement, ranks)
    return TrainedModel(engine, MaskedDistillation(targets), build_momentum_emas(targets, engine, schedule, ranks))
