"""Students of a recipe for the planner: one, or several that share the teachers, which are counted once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mvd_scale.config import FinetuneRecipe, Recipe
from mvd_scale.config.training import Checkpointing
from mvd_scale.performance.planning.communication import Collective, collectives
from mvd_scale.performance.planning.flops import PartFlops, part_flops
from mvd_scale.performance.planning.hardware import AttentionKernel, Gpu
from mvd_scale.performance.planning.parallelism import ParallelConfig, placement_on, setting_from
from mvd_scale.performance.planning.step_time import PhaseTime, phase_times
from mvd_scale.performance.planning.workload import Workload, build_workload
from mvd_scale.training.placement import Placement


@dataclass(frozen=True)
class PlannedStudent:
    """The model of a run, or one of its students, on given hardware."""

    workload: Workload
    """Workload of a clip in a micro batch of `parallel.micro`."""

    placement: Placement
    parallel: ParallelConfig


Students = Mapping[str, PlannedStudent]
"""Students by name; an empty name for the only model of a run."""


def each_model(recipe: Recipe | FinetuneRecipe) -> Mapping[str, Recipe | FinetuneRecipe]:
    """Recipes of the students by name; the recipe itself, under an empty name, if it trains one model."""
    return recipe.each_student() if isinstance(recipe, Recipe) else {"": recipe}


def build_workloads(recipe: Recipe | FinetuneRecipe) -> dict[str, Workload]:
    """Build the workload of each student, see `build_workload`."""
    all_tokens = isinstance(recipe, Recipe) and recipe.shared_tokens is not None
    return {name: build_workload(alone, all_tokens=all_tokens) for name, alone in each_model(recipe).items()}


def place_students(
    recipe: Recipe | FinetuneRecipe,
    workloads: Mapping[str, Workload],
    world: int,
    *,
    per_node: int | None = None,
    gpu: Gpu | None = None,
) -> dict[str, PlannedStudent]:
    """Decide the placement of each student; arguments and exceptions as `placement_on` and `setting_from`."""
    planned = {}
    for name, alone in each_model(recipe).items():
        placement = placement_on(alone, workloads[name], world, per_node=per_node, gpu=gpu)
        parallel = setting_from(placement, alone)
        planned[name] = PlannedStudent(workloads[name].in_batches_of(parallel.micro), placement, parallel)
    return planned


def with_checkpointing(students: Students, checkpointing: Checkpointing) -> dict[str, PlannedStudent]:
    """Copy students with another choice of gradient checkpointing."""
    return {
        name: replace(student, parallel=replace(student.parallel, checkpointing=checkpointing))
        for name, student in students.items()
    }


def students_flops(students: Students) -> list[PartFlops]:
    """Compute the FLOPs of one clip by part, see `part_flops`."""
    return [
        replace(part, part=_label(name, part.part, student))
        for name, student in _teachers_once(students)
        for part in part_flops(student.workload, checkpointing=student.parallel.checkpointing)
    ]


def students_collectives(students: Students, gpu: Gpu, per_node: int) -> list[Collective]:
    """List the collectives of an optimizer step, see `collectives`."""
    return [
        replace(message, name=_label(name, message.name, student))
        for name, student in _teachers_once(students)
        for message in collectives(student.workload, student.parallel, gpu, per_node)
    ]


def students_phases(
    students: Students, gpu: Gpu, per_node: int, kernel: AttentionKernel, efficiency: float | None
) -> list[PhaseTime]:
    """Predict the phases of an optimizer step, see `phase_times`: those of all students one after the other."""
    return [
        replace(phase, student=name)
        for name, student in _teachers_once(students)
        for phase in phase_times(
            student.workload,
            part_flops(student.workload, checkpointing=student.parallel.checkpointing),
            collectives(student.workload, student.parallel, gpu, per_node),
            student.parallel,
            gpu,
            kernel,
            efficiency,
        )
        if phase.phase != "teachers" or student.workload.teachers or not name
    ]


def _teachers_once(students: Students) -> Iterator[tuple[str, PlannedStudent]]:
    """Yield each student with the teachers that no student before it shares with it."""
    seen: set[str] = set()
    for name, student in students.items():
        workload, parallel = student.workload, student.parallel
        kept = [
            index
            for index, part in enumerate(workload.teachers)
            if part.name not in seen or (part.teacher is not None and part.teacher.moves)
        ]
        seen |= {part.name for part in workload.teachers}
        yield (
            name,
            replace(
                student,
                workload=replace(workload, teachers=tuple(workload.teachers[index] for index in kept)),
                parallel=replace(
                    parallel,
                    shards=tuple(parallel.shards[index] for index in kept),
                    prefetched=tuple(parallel.prefetched[index] for index in kept),
                    graphed=tuple(parallel.graphed[index] for index in kept),
                ),
            ),
        )


def _label(name: str, part: str, student: PlannedStudent) -> str:
    """Name of a part of a student, but of a teacher that all share."""
    shared = tuple(
        teacher.name for teacher in student.workload.teachers if teacher.teacher and not teacher.teacher.moves
    )
    return part if not name or part.startswith(shared) else f"{name}: {part}"
