"""Frozen teachers from checkpoints to targets."""

from __future__ import annotations

import hashlib

from mvd_scale.checkpoints.checkpoint import Hints
from mvd_scale.checkpoints.reading import read_source
from mvd_scale.checkpoints.weights import load_encoder
from mvd_scale.config import ModelConfig, Recipe, TimmTarget
from mvd_scale.config.target import TrainedTeacherTarget
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets.objective import build_targets
from mvd_scale.targets.target import FrozenTeacher, Target


def load_targets(recipe: Recipe) -> dict[str, Target]:
    """The targets of a recipe with their teachers' weights on the CPU, memory-mapped where the file allows it.

    Raises:
        UserError: a checkpoint is missing, unreadable, of another shape than the recipe says, or does not fit
            the student's token grid.
    """
    return build_targets(recipe, lambda name: _load_teacher(recipe, name))


def _load_teacher(recipe: Recipe, name: str) -> Encoder | TimmViT:
    config = recipe.targets[name]
    if isinstance(config, TimmTarget):
        return _load_timm(config, recipe.model)
    assert isinstance(config, TrainedTeacherTarget)
    if config.checkpoint is None:
        raise UserError(
            f"targets.{name}.checkpoint is missing: give the teacher's weights with `--targets.{name}.checkpoint PATH`"
        )
    hints = Hints()
    if config.model is not None:
        shape = config.model
        hints = Hints(shape.heads, None, shape.frames, shape.input_size, shape.positions)
    teacher = load_encoder(config.checkpoint, final_norm=False, hints=hints, mapped=True)
    if config.model is not None:
        there, here = (model.model_dump(exclude={"drop_path"}) for model in (teacher.config, config.model))
        differing = ", ".join(f"{key} {there[key]} (recipe: {here[key]})" for key in there if there[key] != here[key])
        if differing:
            raise UserError(f"{config.checkpoint} is not the teacher of targets.{name}.model: it has {differing}")
    return teacher


def _load_timm(config: TimmTarget, student: ModelConfig) -> TimmViT:
    teacher = TimmViT(config.vit, student.grid[1], final_norm=config.final_norm, pretrained=config.checkpoint is None)
    if config.checkpoint is not None:
        teacher.load(read_source(config.checkpoint).tensors, str(config.checkpoint))
    return teacher


def teacher_digests(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each teacher's files: how a run knows that it goes on with the teachers it began with."""
    digests = {}
    for name, config in recipe.targets.items():
        path = getattr(config, "checkpoint", None)
        if path is not None:
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            whole = hashlib.sha256()
            for file in files:
                with file.open("rb") as opened:
                    while chunk := opened.read(1 << 22):
                        whole.update(chunk)
            digests[name] = whole.hexdigest()[:16]
    return digests


def teacher_sides(recipe: Recipe, targets: dict[str, Target]) -> tuple[int, ...]:
    """Input sides in pixels, other than the student's, at which teachers want the crops."""
    sides = {target.input_size for target in targets.values() if isinstance(target, FrozenTeacher)}
    return tuple(sorted(sides - {recipe.model.input_size}))
