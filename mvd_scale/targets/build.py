"""Construction of a recipe's targets, with teachers from checkpoints or with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file

from mvd_scale.config import ImageTeacherTarget, MomentumTarget, PixelTarget, Recipe, TimmTarget
from mvd_scale.config.target import TeacherTarget, TrainedTeacherTarget
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets.image_teacher import ImageTeacher
from mvd_scale.targets.load import build_ema_encoder, build_timm, load_teacher, running_shape, statistics_file
from mvd_scale.targets.momentum import MomentumTeacher
from mvd_scale.targets.pixels import Pixels
from mvd_scale.targets.target import FrozenTeacher, Target
from mvd_scale.targets.timm_teacher import TimmTeacher
from mvd_scale.targets.video_teacher import VideoTeacher


def build_targets(recipe: Recipe, load_teacher: Callable[[str], Encoder | TimmViT]) -> dict[str, Target]:
    """Build the targets of a recipe, by name.

    Args:
        recipe: recipe of pre-training or distillation.
        load_teacher: function from a target's name to its frozen model on the CPU.

    Raises:
        UserError: a teacher does not fit the student's token grid, or has fewer blocks than its target names.
    """
    targets: dict[str, Target] = {}
    mask = recipe.data.mask
    tubes = mask is not None and mask.kind == "tube" and mask.decode_ratio == 1
    for name, config in recipe.targets.items():
        if isinstance(config, PixelTarget):
            targets[name] = Pixels(config, recipe.model)
            continue
        teacher = load_teacher(name)
        _check_layers(name, config, teacher)
        if isinstance(config, TimmTarget):
            assert isinstance(teacher, TimmViT)
            targets[name] = TimmTeacher(name, config, teacher, recipe.model)
            continue
        assert isinstance(teacher, Encoder)
        if isinstance(config, MomentumTarget):
            targets[name] = MomentumTeacher(config, teacher, recipe.model.tubelet)
        elif isinstance(config, ImageTeacherTarget):
            targets[name] = ImageTeacher(name, config, teacher, recipe.model, tubes=tubes)
        else:
            targets[name] = VideoTeacher(name, config, teacher, recipe.model)
    return targets


def _check_layers(name: str, config: TeacherTarget, teacher: Encoder | TimmViT) -> None:
    depth = len(teacher.blocks if isinstance(teacher, Encoder) else teacher.vit.blocks)
    if config.layers and config.layers[-1] > depth:
        raise UserError(
            f"targets.{name}.layers names block {config.layers[-1]}, but its teacher has {depth} blocks, counted from 1"
        )


class SharedTeachers:
    """Function from a student's recipe and a target's name to its frozen model, which all students share.

    Models of momentum targets are a student's own.

    Args:
        build: function that loads or builds a model; called once for each target.
    """

    def __init__(self, build: Callable[[Recipe, str], Encoder | TimmViT]) -> None:
        self._build = build
        self._built: dict[str, Encoder | TimmViT] = {}

    def __call__(self, recipe: Recipe, name: str) -> Encoder | TimmViT:
        """Return the model of the target `name`."""
        if isinstance(recipe.targets[name], MomentumTarget):
            return self._build(recipe, name)
        if name not in self._built:
            self._built[name] = self._build(recipe, name)
        return self._built[name]


def merge_targets(students: Iterable[Mapping[str, Target]]) -> dict[str, Target]:
    """Merge the targets of students by name; one that several students have is that of the first."""
    merged: dict[str, Target] = {}
    for targets in students:
        merged = {**targets, **merged}
    return merged


def load_targets(recipe: Recipe, averages: Path | None = None) -> dict[str, Target]:
    """Build the targets of a recipe, with teachers' weights on the CPU, memory-mapped if the file format allows it.

    Args:
        recipe: recipe with the teachers' files.
        averages: folder with the moving averages of momentum targets, and with the statistics of targets that are
            standardised; None for random weights and features as they are.

    Raises:
        UserError: a checkpoint is missing, unreadable, of another shape than in the recipe, or does not fit the
            student's token grid.
    """
    targets = build_targets(recipe, lambda name: load_teacher(recipe, name, averages))
    for name, target in targets.items():
        if averages is not None and isinstance(target, FrozenTeacher) and target.statistics is not None:
            target.statistics.moments = load_file(statistics_file(averages, name))["moments"]
            target.statistics.restore()
    return targets


def init_teacher(recipe: Recipe, name: str) -> Encoder | TimmViT:
    """Build the frozen model of the target `name` from its shape, with random weights.

    Raises:
        UserError: the recipe does not contain the shape of the model.
    """
    config = recipe.targets[name]
    if isinstance(config, TimmTarget):
        return build_timm(config, recipe.model, pretrained=False)
    if isinstance(config, MomentumTarget):
        return build_ema_encoder(recipe)
    assert isinstance(config, TrainedTeacherTarget)
    if config.model is None:
        raise UserError(f"targets.{name}.model is missing: a benchmark builds its teachers from their shape")
    return Encoder(running_shape(name, config, config.model, recipe.model), final_norm=config.final_norm)


def load_or_init_teacher(recipe: Recipe, name: str) -> Encoder | TimmViT:
    """Load the frozen model of the target `name` from its checkpoint; without one, build it with random weights.

    Raises:
        UserError: see `load_teacher` and `init_teacher`.
    """
    config = recipe.targets[name]
    if isinstance(config, TimmTarget | TrainedTeacherTarget) and config.checkpoint is not None:
        return load_teacher(recipe, name)
    return init_teacher(recipe, name)
