"""Frozen teachers from checkpoints to targets."""

from __future__ import annotations

from mvd_scale.checkpoints.weights import load_encoder
from mvd_scale.config import Recipe
from mvd_scale.config.target import TeacherTarget
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.targets.objective import build_targets
from mvd_scale.targets.target import FrozenTeacher, Target


def load_targets(recipe: Recipe) -> dict[str, Target]:
    """The targets of a recipe with their teachers' weights, float32, on the CPU.

    Raises:
        UserError: a checkpoint is missing, unreadable, of another shape than the recipe says, or does not fit
            the student's token grid.
    """
    return build_targets(recipe, lambda name: _load_teacher(recipe, name))


def _load_teacher(recipe: Recipe, name: str) -> Encoder:
    config = recipe.targets[name]
    assert isinstance(config, TeacherTarget)
    if config.checkpoint is None:
        raise UserError(
            f"targets.{name}.checkpoint is missing: give the teacher's weights with `--targets.{name}.checkpoint PATH`"
        )
    teacher = load_encoder(config.checkpoint, final_norm=False)
    if config.model is not None:
        there, here = (model.model_dump(exclude={"drop_path"}) for model in (teacher.config, config.model))
        differing = ", ".join(f"{key} {there[key]} (recipe: {here[key]})" for key in there if there[key] != here[key])
        if differing:
            raise UserError(f"{config.checkpoint} is not the teacher of targets.{name}.model: it has {differing}")
    return teacher


def teacher_sides(recipe: Recipe, targets: dict[str, Target]) -> tuple[int, ...]:
    """Input sides in pixels, other than the student's, at which teachers want the crops."""
    sides = {target.input_size for target in targets.values() if isinstance(target, FrozenTeacher)}
    return tuple(sorted(sides - {recipe.model.input_size}))
