"""How a recipe is spread over ranks: micro batch, ZeRO stage, precision, which teachers are sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mvd_scale.config import FinetuneRecipe, Recipe
from mvd_scale.config.deepspeed import student_deepspeed, teacher_deepspeed, zero_stage
from mvd_scale.config.training import Checkpointing, Precision
from mvd_scale.models.eight_bit import EightBit, rest_of
from mvd_scale.performance.parts import Workload

SIZES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element."""


@dataclass(frozen=True)
class Setting:
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

    eight_bit: EightBit | None
    """Of the linear layers in the teachers' blocks; None where they are as the rest, in `teacher_precision`."""

    teacher_shards: int
    """Ranks that a sharded teacher is cut over."""

    sharded: tuple[bool, ...]
    """Of each teacher, whether ranks keep shards of it."""

    ahead: tuple[bool, ...]
    """Of each teacher, whether it works on the next micro batch beside the student."""

    graphed: tuple[bool, ...]
    """Of each teacher, whether it is recorded as a CUDA graph, which keeps the memory of a forward pass."""

    batched: bool
    """Whether decoders of one shape run as one batched pass."""

    checkpointing: Checkpointing

    prefetch: int
    """Batches that are decoded ahead."""


def setting_of(
    recipe: Recipe | FinetuneRecipe,
    work: Workload,
    world: int,
    *,
    per_node: int | None = None,
    micro: int | None = None,
) -> Setting:
    """The setting of a recipe on some GPUs.

    Args:
        recipe: what is trained.
        work: its parts.
        world: ranks.
        per_node: ranks of a machine; all of them if None.
        micro: micro batch, a divisor of a rank's share of the global batch; the recipe's if None.

    Raises:
        UserError: the global batch cannot be split so, or the DeepSpeed file contradicts the recipe.
    """
    usual, accumulation = recipe.batch_split(world)
    precision, eight_bit = _teacher_precision(recipe)
    return Setting(
        world=world,
        micro=micro or usual,
        accumulation=usual * accumulation // (micro or usual),
        stage=zero_stage(recipe),
        zero=student_deepspeed(recipe, world)["zero_optimization"],
        teacher_zero=teacher_deepspeed(precision, world)["zero_optimization"],
        precision=recipe.training.precision,
        teacher_precision=precision,
        eight_bit=eight_bit,
        teacher_shards=_teacher_shards(recipe, world, per_node or world),
        sharded=tuple(_sharded(recipe, part.parameters, world) for part in work.teachers),
        ahead=tuple(part.ahead and _ahead(recipe) for part in work.teachers),
        graphed=tuple(_graphed(recipe, part.parameters, world) for part in work.teachers),
        batched=_batched(recipe),
        checkpointing=recipe.training.gradient_checkpointing,
        prefetch=recipe.data.prefetch,
    )


def _teacher_precision(recipe: Recipe | FinetuneRecipe) -> tuple[Precision, EightBit | None]:
    """Of teachers, and of their linear layers in 8 bits."""
    if isinstance(recipe, FinetuneRecipe):
        return recipe.training.precision, None
    precision = recipe.teachers.precision
    if precision == "int8" or precision == "fp8":
        return rest_of(precision), precision
    if precision != "auto":
        return precision, None
    return recipe.training.precision if recipe.device == "cpu" else "fp16", None


def _teacher_shards(recipe: Recipe | FinetuneRecipe, world: int, per_node: int) -> int:
    within = isinstance(recipe, Recipe) and recipe.teachers.shard_over == "node"
    return min(per_node, world) if within else world


def _ahead(recipe: Recipe | FinetuneRecipe) -> bool:
    return isinstance(recipe, Recipe) and recipe.teachers.ahead and recipe.device != "cpu"


def _batched(recipe: Recipe | FinetuneRecipe) -> bool:
    if isinstance(recipe, FinetuneRecipe) or zero_stage(recipe) == 3:
        return False
    asked = recipe.training.batch_decoders
    return recipe.device != "cpu" if asked == "auto" else asked


def _graphed(recipe: Recipe | FinetuneRecipe, parameters: int, world: int) -> bool:
    assert isinstance(recipe, Recipe)
    wanted = recipe.teachers.cuda_graphs is not False and recipe.device != "cpu"
    return wanted and not _sharded(recipe, parameters, world)


def _sharded(recipe: Recipe | FinetuneRecipe, parameters: int, world: int) -> bool:
    assert isinstance(recipe, Recipe)
    if recipe.teachers.precision in ("int8", "fp8"):
        return False
    if recipe.teachers.sharding == "auto":
        return world > 1 and parameters > recipe.teachers.auto_shard_above
    return recipe.teachers.sharding == "zero3"
