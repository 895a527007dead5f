"""Frozen teachers on the ranks: brought to the device, precision and shards that their placement says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from mvd_scale.config.deepspeed import teacher_deepspeed_config
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks, import_deepspeed
from mvd_scale.models.precision import cast_frozen, cast_parameters, dtype_of, refuse_not_finite
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.target import EncoderTeacher
from mvd_scale.training.capabilities import ranks_by_host
from mvd_scale.training.compile import speed_up_teacher, transformer_blocks
from mvd_scale.training.placement import Placement, TeacherPlacement


def place_teachers(targets: Mapping[str, Target], placement: Placement, ranks: Ranks) -> None:
    """Bring the frozen teachers of all targets to their device, precision and shards."""
    for name, target in targets.items():
        if isinstance(target, FrozenTeacher):
            placed = placement.teacher(name)
            target.teacher = place_teacher(target.teacher, placed, ranks)
            if isinstance(target, EncoderTeacher):
                # Copying rows into a recording would cost more than making them there.
                target.accepts_rows = not placed.cuda_graph.value


def place_teacher(teacher: nn.Module, placed: TeacherPlacement, ranks: Ranks) -> nn.Module:
    """Bring a frozen teacher to its device and precision; sharded, each rank keeps a part of it at rest.

    The result is called like the encoder. It has no optimizer and is never part of a checkpoint.
    """
    teacher = teacher.eval().requires_grad_(False)
    shards = placed.shards.value
    if shards is None:
        return speed_up_teacher(cast_teacher(teacher, placed, ranks.device), placed)
    engine = shard_teacher(teacher, placed.rest.value, ranks, keep_vectors=shards.whole_vectors, over=shards.over)
    return speed_up_teacher(engine, placed)


def cast_teacher(teacher: nn.Module, placed: TeacherPlacement, device: torch.device) -> nn.Module:
    """Cast a whole frozen teacher to its precision; see `cast_frozen`."""
    return cast_frozen(teacher, placed.precision.value, device, placed.rest.value)


def shard_teacher(
    teacher: nn.Module,
    precision: Precision,
    ranks: Ranks,
    *,
    keep_vectors: bool = True,
    over: Literal["host", "world"] = "world",
) -> nn.Module:
    """Cut a frozen teacher into ZeRO-3 shards, one layer after the other, over the ranks of each host or over all.

    A layer whose weights are still memory-mapped is read here, so that no rank ever holds more of the teacher than
    its share and one layer. Vectors also stay whole on every rank, which spares their gathers, unless told otherwise.

    Raises:
        UserError: weights that are not finite; all are named.
    """
    deepspeed = import_deepspeed()
    config = teacher_deepspeed_config(precision, ranks.world_size)
    if not keep_vectors:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
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
    assert isinstance(engine, nn.Module)
    return engine


@cache
def _host_group(ranks: Ranks) -> Any:
    """The process group of this host's ranks. All ranks call it."""
    # Every rank takes part in making every group.
    groups = {
        host: torch.distributed.new_group(members, timeout=ranks.timeout)
        for host, members in ranks_by_host(ranks).items()
    }
    return groups[ranks.host]


def _layers(teacher: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a transformer by name, then the whole, for what stands outside of blocks."""
    for name, block in transformer_blocks(teacher):
        yield f"{name}.", block
    yield "", teacher
