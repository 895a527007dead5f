"""Placement of a recipe on a given cluster, and the values of it that time and memory depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from mvd_kernels import bf16_instructions
from mvd_scale.config import FinetuneRecipe, Recipe, RunRecipe
from mvd_scale.config.data import VideoDecoder
from mvd_scale.config.deepspeed import student_deepspeed_config, teacher_deepspeed_config
from mvd_scale.config.students import StudentConfig
from mvd_scale.config.training import Checkpointing, Precision
from mvd_scale.models.quantization import QuantizedPrecision
from mvd_scale.performance.planning.hardware import Gpu, capabilities_of
from mvd_scale.performance.planning.workload import Workload
from mvd_scale.training.placement import Capabilities, DeviceKind, Devices, Placement, TeacherShards, decide_placement

SIZES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per element."""


AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)


@dataclass(frozen=True)
class ParallelConfig:
    """All settings, other than the models, that time and memory depend on."""

    device: DeviceKind

    world: int
    """Number of ranks."""

    micro: int
    """Clips per micro batch of a rank."""

    accumulation: int
    """Micro batches per optimizer step."""

    stage: int
    """ZeRO stage of the student."""

    zero: dict[str, Any]
    """Section `zero_optimization` of the student's DeepSpeed file."""

    teacher_zero: dict[str, Any]
    """Section `zero_optimization` of a sharded teacher's DeepSpeed config."""

    precision: Precision
    teacher_precision: Precision

    quantized: QuantizedPrecision | None
    """8-bit precision of the linear layers in the teachers' blocks; None if they are in `teacher_precision` too."""

    shards: tuple[TeacherShards | None, ...]
    """Sharding of each teacher; None if every rank holds the whole teacher."""

    prefetched: tuple[bool, ...]
    """Whether each teacher computes the features of the next micro batch in parallel with the student's step."""

    graphed: tuple[bool, ...]
    """Whether each teacher runs as a CUDA graph, which permanently holds the memory of a forward pass."""

    batched: bool
    """Whether decoders of the same shape run as one batched pass."""

    checkpointing: Checkpointing

    decoder: VideoDecoder
    """Where videos are decoded."""

    prefetch: int
    """Number of batches that are decoded in advance."""

    @property
    def sharded(self) -> tuple[bool, ...]:
        """Whether each teacher is sharded."""
        return tuple(shards is not None for shards in self.shards)


def placement_on(
    recipe: Recipe | FinetuneRecipe,
    workload: Workload,
    world: int,
    *,
    per_node: int | None = None,
    gpu: Gpu | None = None,
) -> Placement:
    """Decide the placement of a recipe on a number of GPUs, or on CPUs if the recipe's device is `cpu`.

    Args:
        recipe: recipe of pre-training or fine-tuning.
        workload: workload of the recipe.
        world: number of ranks.
        per_node: ranks per host; all ranks if None.
        gpu: type of GPU; if None, one that supports every precision.

    Raises:
        UserError: see `decide_placement`.
    """
    if recipe.device == "cpu":
        devices = Devices("cpu", world, min(per_node or world, world), Capabilities(bf16=bf16_instructions()))
    else:
        capabilities = Capabilities("GPU", bf16=True, fp8=True) if gpu is None else capabilities_of(gpu)
        devices = Devices("cuda", world, min(per_node or world, world), capabilities)
    return decide_placement(recipe, [part.teacher for part in workload.teachers if part.teacher is not None], devices)


def parallel_config(
    recipe: Recipe | FinetuneRecipe,
    workload: Workload,
    world: int,
    *,
    per_node: int | None = None,
    micro: int | None = None,
    gpu: Gpu | None = None,
) -> ParallelConfig:
    """Determine the settings of a recipe on a number of GPUs.

    Args:
        recipe: recipe of pre-training or fine-tuning.
        workload: workload of the recipe.
        world: number of ranks.
        per_node: ranks per host; all ranks if None.
        micro: micro batch, a divisor of a rank's share of the global batch; the recipe's if None.
        gpu: type of GPU; if None, one that supports every precision.

    Raises:
        UserError: the global batch cannot be split over the ranks, the DeepSpeed file contradicts the recipe, or the
            GPU does not support something that the recipe requires.
    """
    if micro is not None:
        recipe = with_training(recipe, micro_batch=micro)
    return setting_from(placement_on(recipe, workload, world, per_node=per_node, gpu=gpu), recipe)


def setting_from(placement: Placement, recipe: Recipe | FinetuneRecipe) -> ParallelConfig:
    """Collect the settings of a placement, and those of the DeepSpeed files.

    Raises:
        UserError: the DeepSpeed file contradicts the recipe.
    """
    world, teachers = placement.devices.ranks, placement.teachers
    # All teachers of a recipe have one precision.
    precision = teachers[0].rest.value if teachers else placement.precision.value
    linear = teachers[0].precision.value if teachers else precision
    return ParallelConfig(
        device=placement.devices.kind,
        world=world,
        micro=placement.micro_batch.value,
        accumulation=placement.accumulation.value,
        stage=placement.zero_stage.value,
        zero=student_deepspeed_config(recipe, world)["zero_optimization"],
        teacher_zero=teacher_deepspeed_config(precision, world)["zero_optimization"],
        precision=placement.precision.value,
        teacher_precision=precision,
        quantized=linear if linear == "int8" or linear == "fp8" else None,
        shards=tuple(teacher.shards.value for teacher in teachers),
        prefetched=tuple(teacher.prefetch.value for teacher in teachers),
        graphed=tuple(teacher.cuda_graph.value for teacher in teachers),
        batched=placement.batch_decoders.value,
        checkpointing=placement.gradient_checkpointing.value,
        decoder=placement.decoder.value,
        prefetch=placement.data_prefetch.value,
    )


def with_training(recipe: AnyRecipe, **values: object) -> AnyRecipe:
    """Copy a recipe with other values in its section `training`, and in students that have the recipe's values."""
    update: dict[str, object] = {"training": recipe.training.model_copy(update=values)}

    def changed(student: StudentConfig) -> StudentConfig:
        own = {key: to for key, to in values.items() if getattr(student.training, key) == getattr(recipe.training, key)}
        return student.model_copy(update={"training": student.training.model_copy(update=own)})

    if isinstance(recipe, Recipe):
        update["students"] = {name: changed(student) for name, student in recipe.students.items()}
    return recipe.model_copy(update=update)


def with_teachers(recipe: Recipe, **values: object) -> Recipe:
    """Copy a recipe with other values in its section `teachers`."""
    return recipe.model_copy(update={"teachers": recipe.teachers.model_copy(update=values)})
