"""Real steps of a recipe, to be measured: the engine, the objective and the clips, without a run folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mvd_scale.config import DataConfig, MomentumTarget, Recipe, TimmTarget, load_recipe
from mvd_scale.config.target import TrainedTeacherTarget
from mvd_scale.config.training import Precision
from mvd_scale.data.index import open_source
from mvd_scale.data.loader import ClipLoader
from mvd_scale.data.samples import make_samples
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets import FrozenTeacher, MaskedDistillation, Target, build_targets
from mvd_scale.targets.load import empty_average, load_targets, teacher_sides
from mvd_scale.training.ahead import Ahead, begin_ahead
from mvd_scale.training.device import placement_of
from mvd_scale.training.engine import train_engine
from mvd_scale.training.loop import reseed
from mvd_scale.training.momentum import moving_averages, start_averages
from mvd_scale.training.optim import apply_schedule, parameter_groups
from mvd_scale.training.ranks import Ranks
from mvd_scale.training.schedule import Schedule
from mvd_scale.training.teachers import host_teachers

LoadTeacher = Callable[[Recipe, str], Encoder | TimmViT]
"""Gives the frozen model of a recipe's target by its name."""


class Parts(Protocol):
    """Who is told when a part of a step begins and ends."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Around a part."""

    def watch(self, name: str, module: nn.Module) -> None:
        """Every forward pass of a module is a part."""


class Rehearsal:
    """The training step of a recipe on all ranks, for a number of steps, its teachers ahead as in training.

    Args:
        recipe: its global batch is the clips of a step; without `data.source` those of the `samples` extra are used.
        ranks: all of them make one.
        parts: told of the parts of every step.
        load_teacher: `random_teacher` or `named_teacher`.
        steps: steps that can be made.
        scratch: folder for videos and manifest.

    Raises:
        UserError: as `load_teacher`, or there are no videos.
    """

    def __init__(
        self, recipe: Recipe, ranks: Ranks, parts: Parts, load_teacher: LoadTeacher, *, steps: int, scratch: Path
    ) -> None:
        self.recipe, self.ranks, self.parts = recipe, ranks, parts
        torch.manual_seed(recipe.seed)
        self.targets: dict[str, Target] = build_targets(recipe, lambda name: load_teacher(recipe, name))
        self.objective = MaskedDistillation(self.targets)
        self.placement = placement_of(recipe, self.targets, ranks)
        self.engine = self._build_engine()
        self.schedule = Schedule(recipe.training, 1, recipe.lr_batch)
        self.averages = moving_averages(self.targets, self.engine, self.schedule, ranks)
        micro, self.accumulation = self.placement.micro_batch.value, self.placement.accumulation.value
        batch = recipe.training.global_batch
        self.loader = ClipLoader(
            open_source(with_clips(recipe.data, scratch), scratch),
            recipe.data.model_copy(update={"clips_per_video": max(batch, recipe.data.clips_per_video)}),
            recipe.model,
            recipe.seed,
            global_batch=batch,
            micro_batch=micro,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            cpus=ranks.cpus,
            start_step=0,
            # After the last step too there is a batch to begin ahead.
            total_steps=steps + 1,
            sides=teacher_sides(recipe, self.targets),
            report=None,
        )
        begin = begin_ahead(self.objective, self.placement, ranks.device)
        self.batches = Ahead(self.loader, begin, lambda: parts.part("data wait"))
        self.done = 0

    def _build_engine(self) -> Any:
        recipe = self.recipe
        student = build_student(recipe, self.targets)
        start_averages(self.targets, student)
        host_teachers(self.targets, self.placement, self.ranks)
        for name, target in self.targets.items():
            if isinstance(target, FrozenTeacher):
                self.parts.watch(f"{name} teacher", target.teacher)
        groups = parameter_groups(student, recipe.training.weight_decay)
        engine = train_engine(student, groups, recipe, self.placement, self.ranks)
        self.parts.watch("student forward", engine)
        return engine

    def __enter__(self) -> Self:
        self.loader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loader.__exit__(kind, error, trace)

    @property
    def part_names(self) -> list[str]:
        """All parts that a step may have, in their order."""
        teachers = [f"{name} teacher" for name in self.targets]
        return ["data wait", *teachers, "student forward", "backward", "optimizer", "moving average"]

    def step(self) -> Tensor:
        """One optimizer step; the mean loss of this rank's micro batches, a float32 scalar on the device."""
        losses = []
        apply_schedule(self.engine.optimizer, self.schedule, self.done)
        for micro in range(self.accumulation):
            reseed(self.recipe, self.done, micro, self.ranks)
            self.clips = next(self.batches)
            loss, _ = self.objective(self.engine, self.clips)
            with self.parts.part("backward"):
                self.engine.backward(loss)
            with self.parts.part("optimizer"):
                self.engine.step()
            losses.append(loss.detach())
        for average in self.averages:
            with self.parts.part("moving average"):
                average.update(self.done)
        self.done += 1
        return torch.stack(losses).mean()


def rehearsed_recipe(name: str, overrides: list[str], precision: Precision | None, batch: int) -> Recipe:
    """The recipe with a batch that fits a measurement, in one micro batch unless the overrides say otherwise.

    Args:
        name: as for `load_recipe`.
        overrides: dotted overrides.
        precision: of the student; fp16 on GPUs and float32 on CPUs if None.
        batch: clips of a step over all ranks.
    """
    precision = precision or ("fp16" if torch.cuda.is_available() else "fp32")
    first = ["--training.precision", precision, "--training.micro_batch", "null"]
    return load_recipe(name, [*first, *overrides, "--training.global_batch", str(batch)])


def build_student(recipe: Recipe, targets: dict[str, Target]) -> Student:
    """The student of a recipe with a head for every target, at random."""
    heads = {name: (recipe.targets[name].head_config, target.channels) for name, target in targets.items()}
    return Student(recipe.model, heads)


def random_teacher(recipe: Recipe, name: str) -> Encoder | TimmViT:
    """The frozen model of a target by its shape alone.

    Raises:
        UserError: the recipe does not say its shape.
    """
    config = recipe.targets[name]
    if isinstance(config, TimmTarget):
        return TimmViT(config.vit, recipe.model.grid[1], final_norm=config.final_norm, pretrained=False)
    if isinstance(config, MomentumTarget):
        return empty_average(recipe)
    assert isinstance(config, TrainedTeacherTarget)
    if config.model is None:
        raise UserError(f"targets.{name}.model is missing: a benchmark builds its teachers from their shape")
    return Encoder(config.model, final_norm=False)


def named_teacher(recipe: Recipe, name: str) -> Encoder | TimmViT:
    """The frozen model of a target from the checkpoint that the recipe names, or at random if it names none.

    Raises:
        UserError: as `load_targets` and `random_teacher`.
    """
    config = recipe.targets[name]
    if isinstance(config, TimmTarget | TrainedTeacherTarget) and config.checkpoint is not None:
        target = load_targets(recipe.model_copy(update={"targets": {name: config}}))[name]
        assert isinstance(target, FrozenTeacher)
        assert isinstance(target.teacher, Encoder | TimmViT)
        return target.teacher
    return random_teacher(recipe, name)


def with_clips(data: DataConfig, scratch: Path) -> DataConfig:
    """The recipe's videos; without any, the clips of the `samples` extra."""
    if data.source is not None or data.mixture is not None:
        return data
    return data.model_copy(update={"source": str(make_samples(scratch / "clips"))})
