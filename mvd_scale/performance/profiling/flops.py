"""FLOPs of a step, and the peak FLOP/s of the device.

FLOPs are counted by torch's counter on the same models on torch's `meta` device, where nothing is computed. On a CPU
that counter does not know the fused attention, and on a GPU it cannot see into kernels of Triton or flash-attn; on
`meta` everything is plain matrix products. DeepSpeed's profiler knows `scaled_dot_product_attention`, but counts
forward passes only; it is used for the table of modules.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mvd_kernels.bench.limits import PRODUCTS, product_flops, product_side
from mvd_scale.config import MomentumTarget, Recipe
from mvd_scale.config.training import Precision
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Student
from mvd_scale.models.precision import dtype_of
from mvd_scale.performance.planning.hardware import known_gpu
from mvd_scale.targets import FrozenTeacher, MaskedDistillation, build_targets
from mvd_scale.targets.build import init_teacher
from mvd_scale.training.teachers.own_masks import StudentObjective, at_all_tokens


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of one rank, and its source."""

    flops_per_second: float
    source: str


class FlopParts:
    """Counter of the FLOPs of every part."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)
        self.flops: dict[str, int] = {}
        self._before: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the body of a `with` statement as a part."""
        self._begin(name)
        yield
        self._end(name)

    def watch(self, name: str, module: nn.Module) -> None:
        """Count every forward pass of a module as a part."""
        module.register_forward_pre_hook(lambda *_: self._begin(name))
        module.register_forward_hook(lambda *_: self._end(name))

    def _begin(self, name: str) -> None:
        self._before[name] = self.counter.get_total_flops()

    def _end(self, name: str) -> None:
        spent = self.counter.get_total_flops() - self._before.pop(name)
        self.flops[name] = self.flops.get(name, 0) + spent


def count_flops(recipe: Recipe, clips: ClipBatch) -> dict[str, int]:
    """Count the FLOPs of one micro batch by part: matrix products, forward and backward, without recomputation.

    Args:
        recipe: recipe that states the shapes of all teachers.
        clips: a micro batch; only its shapes are used.

    Returns:
        FLOPs by the names of `Trainer.part_names`.
    """
    shapes = clips.map(lambda tensor: torch.empty_like(tensor, device="meta"))
    shapes, flops = dataclasses.replace(shapes, features={}), dict[str, int]()
    students = recipe.each_student()
    moving = Counter(
        f"{target} teacher"
        for alone in students.values()
        for target, own in alone.targets.items()
        if isinstance(own, MomentumTarget)
    )
    for name, alone in students.items():
        for part, count in _count_student(alone, name, shapes, recipe.shared_tokens).items():
            # A frozen teacher computes for all students at once.
            shared = part.endswith(" teacher") and moving[part] < 2
            flops[f"{name}: {part}" if name and not shared else part] = count
    return flops


def _count_student(recipe: Recipe, name: str, clips: ClipBatch, all_tokens: int | None) -> dict[str, int]:
    """Count the FLOPs of one student and of its teachers on a batch on torch's meta device.

    Args:
        recipe: recipe of the student alone.
        name: name of the student, if there are several.
        clips: batch of all students.
        all_tokens: number of tokens of a clip if teachers compute features at all of them for masks of students' own.
    """
    parts = FlopParts()
    with torch.device("meta"):
        targets = build_targets(recipe, lambda name: init_teacher(recipe, name))
        student = Student.from_recipe(recipe, targets)
    for key, target in targets.items():
        if isinstance(target, FrozenTeacher):
            parts.watch(f"{key} teacher", target.teacher.to("meta"))
    parts.watch("student forward", student)
    objective = MaskedDistillation(targets)
    with parts.counter:
        if all_tokens is not None:
            clips = at_all_tokens(objective.prefetch_features, all_tokens)(clips)
        loss, _ = StudentObjective(objective, name)(student, clips)
        with parts.part("backward"):
            loss.backward()
    return parts.flops


def peak_flops(device: torch.device, precision: Precision) -> Peak:
    """Peak FLOP/s of a device: from the data sheet of a known GPU, otherwise the best of 5 timed matrix products."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is not None and precision in gpu.peak:
        return Peak(gpu.peak[precision], f"dense {precision} of the {gpu.name}'s data sheet")
    dtype = dtype_of(precision)
    measured, side = product_flops(device, dtype), product_side(device, dtype)
    return Peak(measured, f"best of {PRODUCTS} {precision} matrix products of side {side}, timed in this run")


@contextlib.contextmanager
def module_table(student: nn.Module, out: Path, *, write: bool) -> Iterator[None]:
    """Write DeepSpeed's table of the student's modules (parameters, MACs, latency) for the forward pass in the body.

    Args:
        student: the module inside the engine.
        out: text file to write.
        write: whether this rank writes it.
    """
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    if not write:
        yield
        return
    profiler = FlopsProfiler(student)
    attention = F.scaled_dot_product_attention
    profiler.start_profile()
    yield
    profiler.stop_profile()
    profiler.print_model_profile(output_file=str(out))
    profiler.end_profile()
    # Older releases of DeepSpeed unwrap all functions but this one.
    F.scaled_dot_product_attention = attention
