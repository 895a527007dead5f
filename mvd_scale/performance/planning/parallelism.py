"""A recipe's placement on GPUs that are not at hand, as the numbers that time and memory depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from mvd_kernels import bf16_instructions
from mvd_scale.config import FinetuneRecipe, Recipe, RunRecipe
from mvd_scale.config.deepspeed import student_deepspeed_config, teacher_deepspeed_config
from mvd_scale.config.training import Checkpointing, Precision
from mvd_scale.models.quantization import QuantizedPrecision
from mvd_scale.performance.planning.hardware import Gpu, capabilities_of
from mvd_scale.performance.planning.workload import Workload
from mvd_scale.training.placement import Capabilities, Devices, Placement, TeacherShards, decide_placement

SIZES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element."""


AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)


@dataclass(frozen=True)
class ParallelConfig:
    """Everything besides the models that time and memory depend on."""

    world: int
    micro: int
    accumulation: int

    stage: int
    """Of ZeRO."""

    zero: dict[str, Any]
    """`zero_optimization` of the student's DeepSpeed file."""

    teacher_zero: dict[str, Any]
    """The same of a sharded teacher's."""

    precision: Precision
    teacher_precision: Precision

    quantized: QuantizedPrecision | None
    """Of the linear layers in the teachers' blocks; None where they are as the rest, in `teacher_precision`."""

    shards: tuple[TeacherShards | None, ...]
    """Of each teacher, how ranks share its weights; None where each holds all of them."""

    prefetched: tuple[bool, ...]
    """Of each teacher, whether it works on the next micro batch beside the student."""

    graphed: tuple[bool, ...]
    """Of each teacher, whether it is recorded as a CUDA graph, which keeps the memory of a forward pass."""

    batched: bool
    """Whether decoders of one shape run as one batched pass."""

    checkpointing: Checkpointing

    prefetch: int
    """Batches that are decoded before they are asked for."""

    @property
    def sharded(self) -> tuple[bool, ...]:
        """Of each teacher, whether ranks keep shards of it."""
        return tuple(shards is not None for shards in self.shards)


def placement_on(
    recipe: Recipe | FinetuneRecipe,
    workload: Workload,
    world: int,
    *,
    per_node: int | None = None,
    gpu: Gpu | None = None,
) -> Placement:
    """The placement of a recipe on some GPUs, or on CPUs if that is its device.

    Args:
        recipe: what is trained.
        work: its parts.
        world: ranks.
        per_node: ranks of a machine; all of them if None.
        gpu: the type; one with every precision if None.

    Raises:
        UserError: as `decide_placement`.
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
    """The setting of a recipe on some GPUs.

    Args:
        recipe: what is trained.
        work: its parts.
        world: ranks.
        per_node: ranks of a machine; all of them if None.
        micro: micro batch, a divisor of a rank's share of the global batch; the recipe's if None.
        gpu: as for `placement_on`.

    Raises:
        UserError: the global batch cannot be split so, the DeepSpeed file contradicts the recipe, or the GPU cannot do
            something that the recipe asks for by name.
    """
    if micro is not None:
        recipe = with_training(recipe, micro_batch=micro)
    return setting_from(placement_on(recipe, workload, world, per_node=per_node, gpu=gpu), recipe)


def setting_from(placement: Placement, recipe: Recipe | FinetuneRecipe) -> ParallelConfig:
    """The numbers of a placement, and those that the DeepSpeed files add."""
    world, teachers = placement.devices.ranks, placement.teachers
    # All teachers of a recipe have one precision.
    precision = teachers[0].rest.value if teachers else placement.precision.value
    linear = teachers[0].precision.value if teachers else precision
    return ParallelConfig(
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
        prefetch=placement.data_prefetch.value,
    )


def with_training(recipe: AnyRecipe, **values: object) -> AnyRecipe:
    """A recipe with other values in its section `training`."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})


def with_teachers(recipe: Recipe, **values: object) -> Recipe:
    """A recipe with other values in its section `teachers`."""
    return recipe.model_copy(update={"teachers": recipe.teachers.model_copy(update=values)})
