"""`mvd-scale bench students`: the steps of several students in one run, and of each of them in a run of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, Literal

import torch

from mvd_scale.config import Recipe
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.errors import UserError
from mvd_scale.performance.batches import random_batches
from mvd_scale.performance.bench_setup import bench_recipe, bench_targets
from mvd_scale.performance.report import Metric, Report, this_machine
from mvd_scale.targets import MaskedDistillation
from mvd_scale.targets.build import SharedTeachers, init_teacher, merge_targets
from mvd_scale.targets.load import teacher_input_sizes
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.distillation import StudentParts, distillation_models, random_student
from mvd_scale.training.teachers.prefetch import TeacherPrefetcher, make_prefetcher
from mvd_scale.training.trainer import Trainer

_WARM_UP = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentsReport(Report):
    """Report of `bench students`: medians over the rounds of rank 0."""

    kind: Literal["students"] = "students"
    recipe: str
    overrides: list[str]
    precision: str
    ranks: int
    clips_per_step: int
    rounds: int
    together: float
    """Seconds of a step of all students in one run."""

    alone: dict[str, float]
    """Seconds of a step of a run of its own, by student."""

    @property
    def speedup(self) -> float:
        """Time of the runs one after the other, as a multiple of the time of one run of all students."""
        return sum(self.alone.values()) / self.together

    def setting(self) -> dict[str, Any]:
        """Return the recipe, its overrides, and the conditions of the run."""
        keys = ("recipe", "overrides", "precision", "ranks", "clips_per_step")
        return {key: getattr(self, key) for key in keys}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield the times of a step, and the gain."""
        yield "together, ms", Metric(1000 * self.together)
        for student, seconds in self.alone.items():
            yield f"{student} alone, ms", Metric(1000 * seconds)
        yield "one after the other / together", Metric(self.speedup, more_is_better=True)

    def to_text(self) -> str:
        """Format as a table."""
        clips, total = self.clips_per_step, sum(self.alone.values())
        rows = [
            *((f"{student} alone", seconds) for student, seconds in self.alone.items()),
            ("one after the other", total),
            ("together", self.together),
        ]
        return "\n".join(
            [
                f"{self.recipe}, {self.precision}, {self.ranks} ranks, {clips} clips per step, "
                f"median of {self.rounds} rounds that alternate",
                self.machine.title(),
                f"  {'students':<28}{'ms per step':>12}{'clips/s':>10}",
                *(f"  {name:<28}{1000 * seconds:>12.0f}{clips / seconds:>10.3f}" for name, seconds in rows),
                f"  one run of all students takes {self.together / total:.3f} of the time of {len(self.alone)} runs: "
                f"{self.speedup:.2f} times as fast",
            ]
        )


def measure_students(
    name: str, overrides: list[str], *, precision: Precision | None = None, batch: int, rounds: int
) -> StudentsReport:
    """Time whole optimizer steps of several students together, and of each alone, in turns.

    The runs take turns step by step in one process, so that a machine whose speed drifts treats all alike. Teachers and
    students have random weights. Clips are random pixels: decoding, which the students share too, is not timed.

    Args:
        name: recipe with several `students`, see `load_recipe`.
        overrides: dotted overrides.
        precision: precision of the students; fp16 on GPUs and float32 on CPUs if None.
        batch: clips per step over all ranks.
        rounds: number of timed steps of every run, after one warm-up step.

    Raises:
        UserError: the recipe has no students; see `bench_recipe` and `make_placement`.
    """
    recipe = bench_recipe(name, overrides, precision, batch)
    if not recipe.students:
        raise UserError(f"{name} has no `students`: expected a recipe such as distill/sb_from_b")
    ranks = init_distributed(recipe.device, recipe.training.collective_timeout_minutes)
    torch.manual_seed(recipe.seed)
    runs = _make_runs(recipe, ranks)
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for turn in range(_WARM_UP + rounds):
        for run, trainer in runs.items():
            started = _now(ranks)
            trainer.train_step()
            if turn >= _WARM_UP:
                seconds[run].append(_now(ranks) - started)
    together, *alone = (median(times) for times in seconds.values())
    report = StudentsReport(
        machine=this_machine(ranks.device),
        recipe=name,
        overrides=overrides,
        precision=recipe.training.precision,
        ranks=ranks.world_size,
        clips_per_step=batch,
        rounds=rounds,
        together=together,
        alone=dict(zip(recipe.students, alone, strict=True)),
    )
    destroy_distributed()
    return report


def _make_runs(recipe: Recipe, ranks: Ranks) -> dict[str, Trainer]:
    """Create the trainers: that of all students under an empty name, then that of each. All runs share the teachers."""
    teachers = SharedTeachers(init_teacher)
    groups = {"": list(recipe.students), **{student: [student] for student in recipe.students}}
    parts = {
        run: [_parts_of(recipe, student, teachers, ranks) for student in students] for run, students in groups.items()
    }
    # In one call, which moves each teacher once.
    models = iter(distillation_models([part for run in parts.values() for part in run], ranks, steps_per_epoch=1))
    trainers = {}
    for run, own in parts.items():
        targets = merge_targets(part.targets for part in own)
        # One student alone has its mask as that of the batch, and features at its own tokens only.
        own_recipe = own[0].recipe if run else recipe
        micro, _ = own_recipe.micro_batch_and_accumulation(ranks.world_size)
        batches = random_batches(own_recipe, micro, ranks.device, teacher_input_sizes(own_recipe, targets))
        placements, tokens = [part.placement for part in own], own_recipe.shared_tokens
        begin = make_prefetcher(MaskedDistillation(targets), placements, ranks.device, all_tokens=tokens)
        trainers[run] = Trainer([next(models) for _ in own], TeacherPrefetcher(batches, begin), own_recipe, ranks)
    return trainers


def _parts_of(recipe: Recipe, student: str, teachers: SharedTeachers, ranks: Ranks) -> StudentParts:
    alone = recipe.alone(student)
    (targets,) = bench_targets(alone, teachers).values()
    placement = make_placement(alone, targets, ranks, student)
    return StudentParts(random_student(alone, targets), targets, alone, placement, student)


def _now(ranks: Ranks) -> float:
    """Return the clock in seconds after all work of the device has finished."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter()
