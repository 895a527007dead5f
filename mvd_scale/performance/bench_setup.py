"""Set-up of benchmarks and profiles: the trainer of a recipe, as a run creates it, but without a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from mvd_scale.config import DataConfig, Recipe, load_recipe
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.models import Encoder, Student
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets import MaskedDistillation, Target, build_targets
from mvd_scale.targets.build import SharedTeachers, merge_targets
from mvd_scale.targets.load import teacher_input_sizes
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.distillation import StudentParts, distillation_models, random_student
from mvd_scale.training.teachers.prefetch import BatchSource, TeacherPrefetcher, make_prefetcher
from mvd_scale.training.trainer import Trainer

BuildTeacher = Callable[[Recipe, str], Encoder | TimmViT]
"""Function from a recipe and a target's name to its frozen model: `init_teacher` or `load_or_init_teacher`."""


def bench_recipe(name: str, overrides: list[str], precision: Precision | None, batch: int) -> Recipe:
    """Load a recipe with the batch size of a benchmark, without accumulation unless the overrides set it.

    Args:
        name: recipe, see `load_recipe`.
        overrides: dotted overrides.
        precision: precision of the student; fp16 on GPUs and float32 on CPUs if None.
        batch: clips per step over all ranks.

    Raises:
        UserError: see `load_recipe`.
    """
    precision = precision or ("fp16" if torch.cuda.is_available() else "fp32")
    first = ["--training.precision", precision, "--training.micro_batch", "null"]
    return load_recipe(name, [*first, *overrides, "--training.global_batch", str(batch)])


@contextmanager
def bench_trainer(
    recipe: Recipe, ranks: Ranks, build_teacher: BuildTeacher, *, steps: int, scratch: Path, prefetch: bool = True
) -> Iterator[Trainer]:
    """Create a trainer of a recipe, whose loader runs until the end of the `with` block. All ranks call it.

    Args:
        recipe: recipe; without `data.source` the clips of the `samples` extra are used.
        ranks: this process among all.
        build_teacher: function from recipe and target name to the frozen model of the target.
        steps: largest number of steps that the trainer can run.
        scratch: folder for videos and manifest.
        prefetch: see `make_trainer`.

    Raises:
        UserError: see `build_teacher`; or the data source has no usable videos.
    """
    # Here, because a step from other batches needs no decoder.
    from mvd_scale.data.indexing.build import load_source
    from mvd_scale.data.loaders.clip_loader import ClipLoader

    torch.manual_seed(recipe.seed)
    targets = bench_targets(recipe, build_teacher)
    manifest = load_source(with_clips(recipe.data, scratch), scratch)
    repeats = max(recipe.training.global_batch, recipe.data.clips_per_video)
    repeated = recipe.model_copy(update={"data": recipe.data.model_copy(update={"clips_per_video": repeats})})
    sides = teacher_input_sizes(recipe, merge_targets(targets.values()))
    # One more step than the trainer runs: the last step also starts the next batch in advance.
    with ClipLoader.for_run(manifest, repeated, ranks.data_rank, range(steps + 1), sides=sides) as loader:
        yield make_trainer(recipe, targets, ranks, loader, prefetch=prefetch)


def bench_targets(recipe: Recipe, build_teacher: BuildTeacher) -> dict[str, dict[str, Target]]:
    """Build the targets of each student of a recipe by its name, see `Recipe.each_student`; students share teachers."""
    teachers = SharedTeachers(build_teacher)

    def targets_of(alone: Recipe) -> dict[str, Target]:
        return build_targets(alone, lambda name: teachers(alone, name))

    return {student: targets_of(alone) for student, alone in recipe.each_student().items()}


def make_trainer(
    recipe: Recipe,
    targets: Mapping[str, Mapping[str, Target]],
    ranks: Ranks,
    batches: BatchSource,
    *,
    student: Student | None = None,
    prefetch: bool = True,
) -> Trainer:
    """Create a trainer of a recipe over given batches, with the placement, engine and teachers of a run.

    All ranks call it.

    Args:
        recipe: recipe of the run.
        targets: result of `bench_targets`, with unsharded teachers; their teachers are replaced.
        ranks: this process among all.
        batches: micro batches of this rank.
        student: student of the recipe, if it has one; None to build all with random weights.
        prefetch: whether teachers may compute their features before the students see a batch, as in a run.

    Raises:
        UserError: see `make_placement` and `distillation_models`.
    """
    parts = [
        StudentParts(
            student or random_student(alone, targets[name]),
            targets[name],
            alone,
            make_placement(alone, targets[name], ranks, name),
            name,
        )
        for name, alone in recipe.each_student().items()
    ]
    models = distillation_models(parts, ranks, steps_per_epoch=1)
    objective = MaskedDistillation(merge_targets(targets.values()))
    placements = [part.placement for part in parts]
    tokens = recipe.shared_tokens
    begin = make_prefetcher(objective, placements, ranks.device, all_tokens=tokens) if prefetch else None
    return Trainer(models, TeacherPrefetcher(batches, begin), recipe, ranks)


def with_clips(data: DataConfig, scratch: Path) -> DataConfig:
    """Return the data config; if it names no videos, with the clips of the `samples` extra written to `scratch`."""
    if data.source is not None or data.mixture is not None:
        return data
    from mvd_scale.data.generated.sample_clips import write_sample_clips

    return data.model_copy(update={"source": str(write_sample_clips(scratch / "clips"))})
