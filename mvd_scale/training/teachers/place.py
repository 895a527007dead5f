"""Transfer of frozen teachers to the device, precision and shards of their placement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from mvd_scale.config.deepspeed import teacher_deepspeed_config
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks, import_deepspeed
from mvd_scale.models.bf16_ways import set_bf16_ways
from mvd_scale.models.precision import cast_frozen, cast_parameters, dtype_of, refuse_not_finite
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.target import EncoderTeacher
from mvd_scale.training.capabilities import ranks_by_host
from mvd_scale.training.compile import speed_up_teacher, transformer_blocks
from mvd_scale.training.placement import Placement, TeacherPlacement


def place_teachers(
    targets: Mapping[str, Target], placement: Placement, ranks: Ranks, shared: dict[nn.Module, nn.Module] | None = None
) -> None:
    """Move the frozen teachers of all targets to their device, precision and shards. All ranks call it.

    Args:
        targets: targets by name; their teachers are replaced.
        placement: placement of the recipe.
        ranks: this process among all.
        shared: teachers of other students that were placed before, by the model that was placed; those that are placed
            now are added.

    Raises:
        UserError: see `place_teacher`.
    """
    shared = {} if shared is None else shared
    for name, target in targets.items():
        if isinstance(target, FrozenTeacher):
            placed, teacher = placement.teacher(name), target.teacher
            if teacher not in shared:
                if placement.bf16_ways is not None:
                    set_bf16_ways(teacher, placement.bf16_ways.value)
                shared[teacher] = place_teacher(teacher, placed, ranks)
            target.teacher = shared[teacher]
            if isinstance(target, EncoderTeacher):
                # Copying shared rows into the buffers of a CUDA graph would cost more than computing them again.
                target.accepts_rows = not placed.cuda_graph.value


def place_teacher(teacher: nn.Module, placed: TeacherPlacement, ranks: Ranks) -> nn.Module:
    """Move a frozen teacher to its device, precision and shards. All ranks call it.

    Args:
        teacher: teacher on the CPU.
        placed: placement of the teacher.
        ranks: this process among all.

    Returns:
        model that is called like the teacher; it has no optimizer and is never part of a checkpoint.

    Raises:
        UserError: the device does not support the precision, or weights are not finite.
    """
    teacher = teacher.eval().requires_grad_(False)
    shards = placed.shards.value
    if shards is None:
        return speed_up_teacher(cast_teacher(teacher, placed, ranks.device), placed)
    engine = shard_teacher(teacher, placed.rest.value, ranks, moves=shards.moves, over=shards.over)
    return speed_up_teacher(engine, placed)


def cast_teacher(teacher: nn.Module, placed: TeacherPlacement, device: torch.device) -> nn.Module:
    """Cast an unsharded frozen teacher to its precision on a device; see `cast_frozen`."""
    return cast_frozen(teacher, placed.precision.value, device, placed.rest.value)


def shard_teacher(
    teacher: nn.Module,
    precision: Precision,
    ranks: Ranks,
    *,
    moves: bool = False,
    over: Literal["host", "world"] = "world",
) -> nn.Module:
    """Shard a frozen teacher by ZeRO-3, one layer after the other. All ranks call it.

    Memory-mapped weights are read layer by layer, so that no rank ever holds more of the teacher than its shards and
    one layer.

    Args:
        teacher: teacher on the CPU.
        precision: precision of all weights.
        ranks: this process among all.
        moves: whether the weights are a moving average, see `teacher_deepspeed_config`.
        over: group of ranks that share the weights: the ranks of each host, or all ranks.

    Returns:
        DeepSpeed engine without an optimizer, which is called like the teacher.

    Raises:
        UserError: weights are not finite; the message names all of them.
    """
    deepspeed = import_deepspeed()
    config = teacher_deepspeed_config(precision, ranks.world_size, moves=moves)
    group = _host_group(ranks) if over == "host" else None
    faults = []
    for prefix, layer in _layers(teacher):
        faults += [prefix + name for name in cast_parameters(layer, precision, ranks.device)]
        deepspeed.zero.Init(
            module=layer, data_parallel_group=group, config_dict_or_path=config, dtype=dtype_of(precision)
        )
    refuse_not_finite(faults)
    engine, *_ = deepspeed.initialize(model=teacher.to(ranks.device), config=config, dist_init_required=False)
    engine.eval()
    # The stream on which DeepSpeed gathers does not wait for the copies to the shards.
    deepspeed.get_accelerator().synchronize()
    assert isinstance(engine, nn.Module)
    return engine


@cache
def _host_group(ranks: Ranks) -> Any:
    """Create the process group of this host's ranks. All ranks call it."""
    # `new_group` is a collective operation: every rank must take part in creating every group.
    groups = {
        host: torch.distributed.new_group(members, timeout=ranks.timeout)
        for host, members in ranks_by_host(ranks).items()
    }
    return groups[ranks.host]


def _layers(teacher: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name prefix and module of each block, then of the whole transformer for its remaining layers."""
    for name, block in transformer_blocks(teacher):
        yield f"{name}.", block
    yield "", teacher
