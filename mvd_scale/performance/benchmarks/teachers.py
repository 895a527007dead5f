"""`mvd-scale bench teachers`: speed of frozen teachers and fidelity of their features in each precision."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import nn

from mvd_scale.config import load_recipe
from mvd_scale.config.training import FrozenPrecision
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.indexing.build import load_source
from mvd_scale.distributed.process_group import choose_device
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.models.precision import cast_frozen
from mvd_scale.performance.bench_setup import with_clips
from mvd_scale.performance.report import Metric, Report, this_machine
from mvd_scale.targets import FrozenTeacher, MaskedDistillation, Target, build_targets
from mvd_scale.targets.build import load_or_init_teacher
from mvd_scale.targets.momentum import MomentumTeacher
from mvd_scale.training.teachers.fidelity import LEAST_COSINE, Fidelity, first_clip

PRECISIONS: dict[str, tuple[FrozenPrecision, ...]] = {
    "cpu": ("fp32", "bf16", "int8"),
    "cuda": ("fp32", "fp16", "bf16", "fp8"),
}
"""Precisions that are measured on each kind of device; fp32 is the reference of the others."""


@dataclasses.dataclass(frozen=True)
class TeacherSpeed:
    """Speed and fidelity of one teacher in one precision."""

    target: str
    precision: str
    milliseconds: float
    """Milliseconds per clip."""

    cosine: float
    relative_error: float
    loss_change: float
    """Relative change, against fp32, of the target's distance from the predictions of a student with random weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeachersReport(Report):
    """Report of `bench teachers`."""

    kind: Literal["teachers"] = "teachers"
    recipe: str
    overrides: list[str]
    weights: str
    figures: list[TeacherSpeed]
    absent: dict[str, str]
    """Precisions that this device does not support, with the reason."""

    def setting(self) -> dict[str, Any]:
        """Return the recipe and its overrides."""
        return {"recipe": self.recipe, "overrides": self.overrides}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield time and fidelity of every teacher in every precision."""
        for figure in self.figures:
            yield f"{figure.target} {figure.precision}, ms", Metric(figure.milliseconds)
            yield f"{figure.target} {figure.precision}, cosine", Metric(figure.cosine, more_is_better=True)

    def to_text(self) -> str:
        """Format as a table, one line per teacher and precision."""
        lines = [
            f"{self.recipe}, {self.weights} weights, one clip",
            self.machine.title(),
            f"{'target':<12}{'precision':<11}{'ms/clip':>10}{'speed-up':>10}{'cosine':>10}{'rel. error':>12}"
            f"{'loss':>10}",
        ]
        base = {figure.target: figure.milliseconds for figure in self.figures if figure.precision == "fp32"}
        for figure in self.figures:
            refused = "" if figure.cosine >= LEAST_COSINE else f"  below {LEAST_COSINE}: needs teachers.accept_inexact"
            lines.append(
                f"{figure.target:<12}{figure.precision:<11}{figure.milliseconds:>10.0f}"
                f"{base[figure.target] / figure.milliseconds:>9.2f}x{figure.cosine:>10.5f}"
                f"{figure.relative_error:>12.5f}{figure.loss_change:>+10.3%}{refused}"
            )
        return "\n".join([*lines, *(f"not measured: {name} ({why})" for name, why in self.absent.items())])


def measure_teachers(name: str, overrides: list[str], *, steps: int) -> TeachersReport:
    """Time the teachers of a recipe on one clip, each in every precision that the device supports.

    Args:
        name: recipe, see `load_recipe`.
        overrides: dotted overrides; teachers without a checkpoint have random weights, and without `data.source` the
            clip is one of the `samples` extra.
        steps: number of timed calls, after one warm-up call; the fastest counts.

    Raises:
        UserError: the recipe has no frozen teacher.
    """
    recipe = load_recipe(name, ["--training.precision", "fp32", *overrides])
    device = choose_device(recipe.device)
    torch.manual_seed(recipe.seed)
    targets = build_targets(recipe, lambda target: load_or_init_teacher(recipe, target))
    teachers = {key: target for key, target in targets.items() if _frozen(target)}
    if not teachers:
        raise UserError(
            f"recipe {name} has no frozen teacher: expected a recipe of distillation, such as distill/b_from_b"
        )
    student = Student.from_recipe(recipe, targets).to(device).eval()
    with tempfile.TemporaryDirectory() as scratch:
        manifest = load_source(with_clips(recipe.data, Path(scratch)), Path(scratch))
        clips = first_clip(targets, recipe, manifest, device)
    figures: list[TeacherSpeed] = []
    absent: dict[str, str] = {}
    for key, target in teachers.items():
        unchanged = target.teacher
        if target.statistics is not None:
            target.statistics.to(device)
        for precision in PRECISIONS[device.type]:
            try:
                target.teacher = cast_frozen(copy.deepcopy(unchanged), precision, device)
            except UserError as error:
                absent[precision] = str(error)
                continue
            features = target.features(clips)
            loss = _loss(key, target, student, clips)
            if precision == "fp32":
                reference, reference_loss = features, loss
            fidelity = Fidelity.of(features, reference)
            seconds = min(_seconds(target, clips) for _ in range(steps))
            change = loss / reference_loss - 1
            figures.append(
                TeacherSpeed(key, precision, 1000 * seconds, fidelity.cosine, fidelity.relative_error, change)
            )
        target.teacher = unchanged
    checkpoints = [getattr(config, "checkpoint", None) for config in recipe.targets.values()]
    return TeachersReport(
        machine=this_machine(device),
        recipe=name,
        overrides=overrides,
        weights="the recipe's" if any(checkpoints) else "random",
        figures=figures,
        absent=absent,
    )


def _frozen(target: Target) -> TypeGuard[FrozenTeacher]:
    return isinstance(target, FrozenTeacher) and not isinstance(target, MomentumTeacher)


@torch.no_grad()
def _loss(name: str, target: FrozenTeacher, student: nn.Module, clips: ClipBatch) -> float:
    predicted = student(clips.pixels, clips.visible, clips.masked)
    _, distances = MaskedDistillation({name: target})(lambda *_: predicted, clips)  # type: ignore[arg-type]
    return float(distances[name])


def _seconds(target: FrozenTeacher, clips: ClipBatch) -> float:
    if clips.pixels.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    target.features(clips)
    if clips.pixels.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
