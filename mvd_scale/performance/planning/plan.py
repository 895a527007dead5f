"""`mvd-scale plan`: prediction of FLOPs, memory, communication, decoding and time of a recipe on given GPUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from mvd_scale.config import FinetuneRecipe, Recipe, load_any_recipe, load_finetune_recipe, load_recipe
from mvd_scale.config.training import Checkpointing
from mvd_scale.errors import UserError
from mvd_scale.performance.planning.communication import Collective
from mvd_scale.performance.planning.flops import PartFlops
from mvd_scale.performance.planning.hardware import (
    GIB,
    GPUS,
    AttentionKernel,
    Gpu,
    find_gpu,
    find_kernel,
    sustained_flops,
    usable_memory,
)
from mvd_scale.performance.planning.memory import Memory, predict_students_memory
from mvd_scale.performance.planning.parallelism import ParallelConfig, with_teachers, with_training
from mvd_scale.performance.planning.published import PublishedComparison, compare_with_paper
from mvd_scale.performance.planning.step_time import PhaseTime
from mvd_scale.performance.planning.students import (
    PlannedStudent,
    Students,
    build_workloads,
    place_students,
    students_collectives,
    students_flops,
    students_phases,
    with_checkpointing,
)
from mvd_scale.performance.planning.video_decoding import (
    VideoFormat,
    decoded_clips,
    decoded_frames,
    decoding_memory,
)
from mvd_scale.performance.planning.workload import Workload
from mvd_scale.training.placement import Placement


@dataclass(frozen=True)
class Cluster:
    """Hardware and data of a plan."""

    gpu: Gpu

    gpus: int
    """Number of GPUs, one rank each."""

    per_node: int
    """GPUs per host."""

    kernel: AttentionKernel

    efficiency: float | None
    """Share of the peak FLOP/s that replaces the table's values; None to use the table."""

    video: VideoFormat

    videos: int
    """Number of videos per epoch."""


@dataclass(frozen=True)
class MicroBatchForecast:
    """Prediction for one size of the micro batch; memory in bytes per rank."""

    micro: int
    accumulation: int
    memory: int
    fits: bool
    clips_per_second: float


@dataclass(frozen=True)
class CheckpointingForecast:
    """Prediction for one choice of `training.gradient_checkpointing`; memory in bytes per rank."""

    recomputed: float
    """Recomputed FLOPs per clip."""

    activations: int
    memory: int
    fits: bool
    clips_per_second: float


@dataclass(frozen=True)
class Plan:
    """Prediction for a run. Bytes are per rank, seconds per optimizer step."""

    recipe: str
    cluster: Cluster
    placement: Placement
    parallel: ParallelConfig
    """Settings of the model; of several students those of the first."""

    students: dict[str, Placement]
    """Placement of each of several students by name; empty for one model."""

    recipe_micro: int
    parameters: int
    """Number of trained parameters of all students."""

    tensors: int
    """Number of trained parameter tensors of all students."""

    flops: list[PartFlops]
    memory: Memory
    memory_usable: float
    messages: list[Collective]
    phases: list[PhaseTime]

    decoded_frames: float
    """Mean number of decoded frames per clip."""

    decode_capacity: float | None
    """Clips/s that the NVDEC engines of all GPUs decode; None if they decode nothing."""

    arithmetic_share: float
    """FLOP/s of the step divided by the peak FLOP/s of all GPUs."""

    step_seconds: float
    clips_per_second: float
    decode_needed: float
    epoch_seconds: float
    run_hours: float
    limit: str
    candidates: list[MicroBatchForecast]

    policies: dict[Checkpointing, CheckpointingForecast]
    """Prediction for each choice of gradient checkpointing, at the same micro batch."""

    comparison: PublishedComparison | None

    @property
    def best(self) -> MicroBatchForecast:
        """Fastest micro batch that fits in memory; among equally fast ones, the largest."""
        return max((c for c in self.candidates if c.fits), key=lambda c: (c.clips_per_second, c.micro))


def make_plan(name: str, overrides: list[str], cluster: Cluster) -> Plan:
    """Predict resources and time of a run.

    Args:
        name: recipe of pre-training or fine-tuning, see `load`.
        overrides: dotted overrides.
        cluster: hardware and data.

    Raises:
        UserError: the recipe cannot be read, its global batch cannot be split over the GPUs, the GPU does not support a
            precision, or no micro batch fits in memory; the message then lists changes that fit.
    """
    recipe = load(name, overrides)
    workloads = build_workloads(recipe)
    requested = _first(_place(recipe, workloads, cluster)).parallel
    frozen = any(workload.teachers for workload in workloads.values())
    teacher_precisions = [requested.quantized or requested.teacher_precision] if frozen else []
    # Raises a `UserError` if the GPU does not support one of the precisions.
    for precision in (*teacher_precisions, requested.precision):
        sustained_flops(cluster.gpu, precision, cluster.kernel, 1, cluster.efficiency)
    recipes = [with_training(recipe, micro_batch=micro) for micro in micro_batches(recipe, cluster.gpus)]
    settings = [_place(changed, workloads, cluster) for changed in recipes]
    candidates = [_candidate(recipe, students, cluster) for students in settings]
    if not candidates[0].fits:
        raise UserError(_what_fits(recipe, settings[0], cluster))
    fitting = [students for students, candidate in zip(settings, candidates, strict=True) if candidate.fits]
    # The micro batch that the run would use; if it does not fit, the largest smaller one that does.
    micros = {_first(students).parallel.micro: students for students in fitting}
    micro = max(micro for micro in micros if micro <= requested.micro)
    students = (
        _place(with_training(recipe, micro_batch=micro), workloads, cluster)
        if micro != requested.micro
        else _place(recipe, workloads, cluster)
    )
    return _plan(name, recipe, students, cluster, candidates, requested.micro)


def make_cluster(
    gpu: str,
    gpus: int,
    per_node: int,
    *,
    attention: str | None,
    efficiency: float | None,
    video: VideoFormat,
    videos: int,
) -> Cluster:
    """Describe a cluster of GPUs, given by name.

    Raises:
        UserError: the GPU or the attention kernel is unknown, or `gpus` is not a multiple of `per_node`.
    """
    gpu_type = find_gpu(gpu)
    per_node = min(per_node, gpus)
    if gpus % per_node:
        below = gpus // per_node * per_node
        raise UserError(
            f"--gpus {gpus} is not a multiple of --per-node {per_node}: use {below} or {below + per_node} GPUs"
        )
    return Cluster(gpu_type, gpus, per_node, find_kernel(gpu_type, attention), efficiency, video, videos)


def with_stage(overrides: list[str], stage: int | None) -> list[str]:
    """Add an override of the ZeRO stage, which selects the DeepSpeed file of that stage.

    Raises:
        UserError: the overrides already select a DeepSpeed file.
    """
    if stage is None:
        return overrides
    if any(word.partition("=")[0] == "--training.deepspeed" for word in overrides):
        raise UserError(
            "--stage cannot be combined with --training.deepspeed, which sets the stage itself: give one of them"
        )
    return [*overrides, "--training.deepspeed", f"zero{stage}"]


def load(name: str, overrides: list[str]) -> Recipe | FinetuneRecipe:
    """Load a recipe of pre-training or fine-tuning.

    Raises:
        UserError: see `load_recipe`; or the recipe is of another kind.
    """
    kind = load_any_recipe(name)
    if isinstance(kind, FinetuneRecipe):
        return load_finetune_recipe(name, overrides)
    if isinstance(kind, Recipe):
        return load_recipe(name, overrides)
    raise UserError(f"{name} is a recipe of action detection: expected a recipe of pre-training or fine-tuning")


def micro_batches(recipe: Recipe | FinetuneRecipe, world: int) -> list[int]:
    """List every micro batch that divides a rank's share of the global batch, ascending."""
    micro, accumulation = recipe.micro_batch_and_accumulation(world)
    share, copies = micro * accumulation, recipe.data.copies
    return [count for count in range(copies, share + 1, copies) if share % count == 0]


def _place(
    recipe: Recipe | FinetuneRecipe, workloads: Mapping[str, Workload], cluster: Cluster
) -> dict[str, PlannedStudent]:
    return place_students(recipe, workloads, cluster.gpus, per_node=cluster.per_node, gpu=cluster.gpu)


def _first(students: Students) -> PlannedStudent:
    return next(iter(students.values()))


def _candidate(recipe: Recipe | FinetuneRecipe, students: Students, cluster: Cluster) -> MicroBatchForecast:
    parallel = _first(students).parallel
    memory = _memory(recipe, students, cluster).peak
    seconds = _step_seconds(recipe, parallel, _phases(students, cluster), cluster)
    return MicroBatchForecast(
        parallel.micro,
        parallel.accumulation,
        memory,
        memory <= usable_memory(cluster.gpu),
        recipe.training.global_batch / seconds,
    )


def _policy(
    recipe: Recipe | FinetuneRecipe, students: Students, cluster: Cluster, checkpointing: Checkpointing
) -> CheckpointingForecast:
    students = with_checkpointing(students, checkpointing)
    candidate = _candidate(recipe, students, cluster)
    phases = _students_memory(students).phases
    return CheckpointingForecast(
        sum(part.recomputed for part in students_flops(students)),
        max(parts["activations"] for phase, parts in phases.items() if phase.endswith("start of the backward pass")),
        candidate.memory,
        candidate.fits,
        candidate.clips_per_second,
    )


def _students_memory(students: Students) -> Memory:
    return predict_students_memory({name: (known.workload, known.parallel) for name, known in students.items()})


def _memory(recipe: Recipe | FinetuneRecipe, students: Students, cluster: Cluster) -> Memory:
    parallel = _first(students).parallel
    decoding = decoding_memory(recipe.data, recipe.model, cluster.video, parallel.micro, parallel.decoder)
    return _students_memory(students).with_parts(decoding)


def _phases(students: Students, cluster: Cluster) -> list[PhaseTime]:
    return students_phases(students, cluster.gpu, cluster.per_node, cluster.kernel, cluster.efficiency)


def _decode_capacity(recipe: Recipe | FinetuneRecipe, parallel: ParallelConfig, cluster: Cluster) -> float | None:
    if recipe.model.frames == 1 or parallel.decoder == "host":
        return None
    return cluster.gpus * decoded_clips(cluster.gpu, recipe.data, recipe.model, cluster.video)


def _step_seconds(
    recipe: Recipe | FinetuneRecipe, parallel: ParallelConfig, phases: list[PhaseTime], cluster: Cluster
) -> float:
    """Compute the seconds per step: the longer one of computing and decoding, which overlap."""
    capacity = _decode_capacity(recipe, parallel, cluster)
    decoding = recipe.training.global_batch / capacity if capacity is not None else 0.0
    return max(sum(phase.seconds for phase in phases), decoding)


def _limit(phases: list[PhaseTime], step_seconds: float) -> str:
    """Find the resource that bounds the largest part of the step's time."""
    if step_seconds > sum(phase.seconds for phase in phases):
        return "decoding"
    bounded: dict[str, float] = defaultdict(float)
    for phase in phases:
        for resource, seconds in phase.bounds.items():
            bounded[resource] += seconds
    return max(bounded, key=lambda resource: bounded[resource])


def _plan(
    name: str,
    recipe: Recipe | FinetuneRecipe,
    students: Students,
    cluster: Cluster,
    candidates: list[MicroBatchForecast],
    recipe_micro: int,
) -> Plan:
    first = _first(students)
    parallel, workloads = first.parallel, [student.workload for student in students.values()]
    batch, phases, flops = recipe.training.global_batch, _phases(students, cluster), students_flops(students)
    seconds = _step_seconds(recipe, parallel, phases, cluster)
    drawn = cluster.videos * recipe.data.clips_per_video * recipe.data.copies
    steps = drawn // batch
    if not steps:
        raise UserError(f"--videos {cluster.videos}: an epoch of {drawn} clips has no whole global batch of {batch}")
    whole = steps * recipe.training.epochs
    planned = min(recipe.training.max_steps or whole, whole)
    hours, computing = planned * seconds / 3600, sum(phase.seconds for phase in phases)
    computed = batch * sum(part.total for part in flops) / seconds
    return Plan(
        recipe=name,
        cluster=cluster,
        placement=first.placement,
        parallel=parallel,
        students={name: student.placement for name, student in students.items() if name},
        recipe_micro=recipe_micro,
        parameters=sum(workload.parameters for workload in workloads),
        tensors=sum(workload.tensors for workload in workloads),
        flops=flops,
        memory=_memory(recipe, students, cluster),
        memory_usable=usable_memory(cluster.gpu),
        messages=students_collectives(students, cluster.gpu, cluster.per_node),
        phases=phases,
        decoded_frames=decoded_frames(recipe.data, recipe.model, cluster.video),
        decode_capacity=_decode_capacity(recipe, parallel, cluster),
        arithmetic_share=computed / (cluster.gpus * cluster.gpu.peak[parallel.precision]),
        step_seconds=seconds,
        clips_per_second=batch / seconds,
        decode_needed=batch / computing,
        epoch_seconds=steps * seconds,
        run_hours=hours,
        limit=_limit(phases, seconds),
        candidates=candidates,
        policies={choice: _policy(recipe, students, cluster, choice) for choice in get_args(Checkpointing)},
        comparison=None
        if len(students) > 1
        else compare_with_paper(
            name, cluster.gpu, cluster.gpus, first.workload, planned * batch, hours, hours * computing / seconds
        ),
    )


def _what_fits(recipe: Recipe | FinetuneRecipe, students: Students, cluster: Cluster) -> str:
    """Compose the error message for a smallest micro batch that does not fit, with the changes that would fit."""
    needed, usable = _memory(recipe, students, cluster).peak, usable_memory(cluster.gpu)
    parallel, workloads = _first(students).parallel, {name: known.workload for name, known in students.items()}
    recipe = with_training(recipe, micro_batch=parallel.micro)
    settings = {options: _place(changed, workloads, cluster) for options, changed in _changes(recipe, parallel).items()}
    fitting = [options for options, changed in settings.items() if _memory(recipe, changed, cluster).peak <= usable]
    fitting += [f"--gpu {gpu.name}" for gpu in GPUS.values() if needed <= usable_memory(gpu)]
    return (
        f"a rank needs {needed / GIB:.1f} GiB even with a micro batch of {parallel.micro}, and {cluster.gpu.name} has "
        f"{usable / GIB:.1f} GiB for tensors; "
        + (
            f"changes that fit: {', or '.join(fitting)}"
            if fitting
            else "no change or GPU in the table fits: use more GPUs"
        )
    )


def _changes(recipe: Recipe | FinetuneRecipe, parallel: ParallelConfig) -> dict[str, Recipe | FinetuneRecipe]:
    """List changed recipes that need less memory, by the command-line options of the change."""
    again, shard = "--training.gradient_checkpointing", "--teachers.sharding zero3"
    # If the recipe sets these options to true, the placement raises an error at stage 3.
    whole: dict[str, object] = {"compile": "auto"}
    if isinstance(recipe, Recipe):
        whole["batch_decoders"] = "auto"
    zero3 = with_training(recipe, deepspeed="zero3", **whole)
    changes: dict[str, Recipe | FinetuneRecipe] = {
        f"{again} attention": with_training(recipe, gradient_checkpointing="attention"),
        f"{again} block": with_training(recipe, gradient_checkpointing="block"),
        "--stage 3": zero3,
        f"--stage 3 {again} block": with_training(zero3, gradient_checkpointing="block"),
    }
    if isinstance(recipe, Recipe):
        if any(parallel.prefetched):
            changes["--teachers.prefetch false"] = with_teachers(recipe, prefetch=False)
        if any(parallel.graphed):
            changes["--teachers.cuda_graphs false"] = with_teachers(recipe, cuda_graphs=False)
        if parallel.shards and parallel.quantized is None:
            sharded: dict[str, object] = {"sharding": "zero3", "compile": "auto", "cuda_graphs": "auto"}
            changes[shard] = with_teachers(recipe, **sharded)
            changes[f"--stage 3 {shard} {again} block"] = with_training(
                with_teachers(recipe, **sharded), deepspeed="zero3", gradient_checkpointing="block", **whole
            )
    return changes
