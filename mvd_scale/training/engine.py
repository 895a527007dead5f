"""The only file that makes engines of DeepSpeed: the student's, and those of sharded teachers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvd_scale.config import Recipe, RunRecipe, TeacherConfig
from mvd_scale.config.deepspeed import student_deepspeed, teacher_deepspeed
from mvd_scale.config.training import FrozenPrecision, Precision
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.models.blocks import checkpoint_gradients
from mvd_scale.models.eight_bit import to_eight_bits
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.momentum import Momentum
from mvd_scale.targets.target import EncoderTeacher
from mvd_scale.training.compilation import (
    GATHERED,
    LAYERWISE,
    GraphedTeacher,
    batches_decoders,
    compile_blocks,
    compiles,
    speed_up_teacher,
    transformer_blocks,
)
from mvd_scale.training.optim import build_optimizer
from mvd_scale.training.ranks import Ranks, import_deepspeed

logger = logging.getLogger("mvd_scale")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: Precision) -> torch.dtype:
    """Of weights in a precision."""
    return _DTYPES[precision]


def train_engine(model: nn.Module, groups: list[dict[str, Any]], recipe: RunRecipe, ranks: Ranks) -> Any:
    """A model under DeepSpeed ZeRO with its optimizer; parameters are sharded from here on at stage 3.

    Args:
        model: on the CPU.
        groups: its parameters, as `optim.parameter_groups` cuts them.
        recipe: precision, DeepSpeed file, batch and optimizer.
        ranks: all of them call this.

    Raises:
        UserError: the DeepSpeed file contradicts the recipe, or the device lacks the precision or a compiler.
    """
    check_precision(recipe.training.precision, ranks.device)
    config = student_deepspeed(recipe, ranks.world_size)
    gathers = config["zero_optimization"]["stage"] == 3
    programs = compiles("training.compile", recipe.training.compile, ranks.device, GATHERED if gathers else "")
    if isinstance(recipe, Recipe) and isinstance(model, Student):
        obstacle = LAYERWISE if gathers else ""
        if batches_decoders(model, recipe.training.batch_decoders, ranks.device, obstacle):
            model.batch_decoders()
    checkpoint_gradients(model, recipe.training.gradient_checkpointing)
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device") in ("cpu", "nvme")
    engine, *_ = import_deepspeed().initialize(
        model=model.to(ranks.device),
        optimizer=build_optimizer(groups, recipe.training, ranks.device, offload=offload),
        config=config,
        dist_init_required=False,
    )
    # Off by default in float32 at stages 1 and 2: without it a step that is not finite would ruin the weights.
    engine.optimizer.check_grad_overflow = True
    if programs:
        # Not `engine.compile()`: that makes one program of the whole model.
        compile_blocks(engine.module)
    return engine


def teacher_precision(recipe: Recipe, device: torch.device) -> FrozenPrecision:
    """The precision of frozen teachers: fp16 on GPUs, the student's on CPUs, unless the recipe says otherwise."""
    if recipe.teachers.precision != "auto":
        return recipe.teachers.precision
    return "fp16" if device.type == "cuda" else recipe.training.precision


def shards_teacher(teachers: TeacherConfig, teacher: nn.Module, world_size: int) -> bool:
    """Whether a teacher is kept in shards: memory at rest against the time of gathers."""
    if teachers.sharding == "auto":
        return world_size > 1 and sum(p.numel() for p in teacher.parameters()) > teachers.auto_shard_above
    return teachers.sharding == "zero3"


def host_teachers(targets: Mapping[str, Target], recipe: Recipe, ranks: Ranks) -> None:
    """Bring the frozen teachers of all targets to their device, precision and shards."""
    for target in targets.values():
        if isinstance(target, FrozenTeacher):
            target.teacher = host_teacher(target.teacher, recipe, ranks, moves=isinstance(target, Momentum))
            if isinstance(target, EncoderTeacher):
                # Copying rows into a recording would cost more than making them there.
                target.takes_rows = not isinstance(target.teacher, GraphedTeacher)


def host_teacher(teacher: nn.Module, recipe: Recipe, ranks: Ranks, *, moves: bool = False) -> nn.Module:
    """Bring a frozen teacher to its device and precision; sharded, each rank keeps a part of it at rest.

    One whose weights move during the run keeps nothing but its shards.

    The result is called like the encoder. It has no optimizer and is never part of a checkpoint.
    """
    precision = teacher_precision(recipe, ranks.device)
    teacher = teacher.eval().requires_grad_(False)
    if precision != "int8" and precision != "fp8" and shards_teacher(recipe.teachers, teacher, ranks.world_size):
        check_precision(precision, ranks.device)
        # The shares of an average that moves are those of the student, which is cut over all ranks.
        over = "world" if moves else recipe.teachers.shard_over
        engine = shard_teacher(teacher, precision, ranks, keep_vectors=not moves, over=over)
        return speed_up_teacher(engine, recipe.teachers, precision, ranks.device, sharded=True)
    whole = lower_teacher(teacher, recipe, ranks.device)
    return speed_up_teacher(whole, recipe.teachers, precision, ranks.device, sharded=False)


def lower_teacher(teacher: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """`lower` a whole frozen teacher to the precision of its recipe."""
    return lower(teacher, teacher_precision(recipe, device), device)


def lower(model: nn.Module, precision: FrozenPrecision, device: torch.device) -> nn.Module:
    """Bring a whole model that is not trained to its device and precision.

    Raises:
        UserError: the device lacks the precision, or weights are not finite.
    """
    model = model.eval().requires_grad_(False)
    if precision == "int8" or precision == "fp8":
        _refuse(_read(model, "fp32", torch.device("cpu")))
        return to_eight_bits(model, precision, device).requires_grad_(False)
    check_precision(precision, device)
    _refuse(_read(model, precision, device))
    return model.to(device)


def shard_teacher(
    teacher: nn.Module,
    precision: Precision,
    ranks: Ranks,
    *,
    keep_vectors: bool = True,
    over: Literal["node", "world"] = "world",
) -> nn.Module:
    """Cut a frozen teacher into ZeRO-3 shards, one layer after the other, over the ranks of each host or over all.

    A layer whose weights are still memory-mapped is read here, so that no rank ever holds more of the teacher than
    its share and one layer. Vectors also stay whole on every rank, which spares their gathers, unless told otherwise.

    Raises:
        UserError: weights that are not finite; all are named.
    """
    deepspeed = import_deepspeed()
    config = teacher_deepspeed(precision, ranks.world_size)
    if not keep_vectors:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    group = _ranks_of_my_host(ranks) if over == "node" else None
    faults = []
    for prefix, layer in _layers(teacher):
        faults += [prefix + name for name in _read(layer, precision, ranks.device)]
        deepspeed.zero.Init(
            module=layer, data_parallel_group=group, config_dict_or_path=config, dtype=_DTYPES[precision]
        )
    _refuse(faults)
    engine, *_ = deepspeed.initialize(model=teacher.to(ranks.device), config=config, dist_init_required=False)
    engine.eval()
    assert isinstance(engine, nn.Module)
    return engine


@cache
def _ranks_of_my_host(ranks: Ranks) -> Any:
    """The process group of this host's ranks; None (all ranks) if there is one host, or one rank on each.

    All ranks call it. Hosts may have different numbers of ranks.
    """
    told: list[str] = [""] * ranks.world_size
    torch.distributed.all_gather_object(told, ranks.host)
    hosts = {host: [rank for rank, other in enumerate(told) if other == host] for host in dict.fromkeys(told)}
    if len(hosts) in (1, ranks.world_size):
        return None
    # Every rank takes part in making every group.
    groups = {host: torch.distributed.new_group(members, timeout=ranks.timeout) for host, members in hosts.items()}
    return groups[ranks.host]


def _read(layer: nn.Module, precision: Precision, device: torch.device) -> list[str]:
    """Bring a layer's parameters to the device and precision; names of those that are not finite."""
    faults = []
    for name, parameter in layer.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            continue
        if not torch.isfinite(parameter).all():
            faults.append(name)
        # A copy of its own: a view would keep the file mapped.
        parameter.data = parameter.data.to(device, _DTYPES[precision], copy=True)
    return faults


def _refuse(faults: list[str]) -> None:
    if faults:
        raise UserError("weights are not finite:\n  " + "\n  ".join(faults))


def _layers(teacher: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a transformer by name, then the whole, for what stands outside of blocks."""
    for name, block in transformer_blocks(teacher):
        yield f"{name}.", block
    yield "", teacher


def usual_precision(device: torch.device) -> Precision:
    """Of inference where none is asked for."""
    return "fp16" if device.type == "cuda" else "fp32"


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse what the device cannot compute.

    Raises:
        UserError: fp16 on a CPU, bf16 on a GPU without it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: on CPUs use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16: use fp16 or fp32")


def full_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the student by name: whole, float32, on the CPU. All ranks must iterate."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        yield name, full.detach().float().cpu().clone()


def online_share(online: nn.Parameter, averaged: nn.Parameter, ranks: Ranks) -> Tensor:
    """The part of a parameter of the student that this rank keeps of its moving average: float32, flat.

    At ZeRO stage 3 and with a sharded average both are cut alike and nothing is sent; at stages 1 and 2 every rank has
    the whole parameter in the precision that it trains in. All ranks call it.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    if not hasattr(online, "ds_id"):
        return share_of(online.detach(), averaged, ranks).float()
    if hasattr(averaged, "ds_tensor"):
        local: Tensor = safe_get_local_fp32_param(online)
        return local
    full: Tensor = safe_get_full_fp32_param(online)
    return full.detach().float().flatten()


def share_of(whole: Tensor, like: nn.Parameter, ranks: Ranks) -> Tensor:
    """What this rank keeps of a whole tensor if it is cut as the parameter `like` is: flat, padded with zeros."""
    flat = whole.flatten()
    if not hasattr(like, "ds_tensor"):
        return flat
    size = like.ds_tensor.numel()
    share = flat[ranks.rank * size : (ranks.rank + 1) * size]
    return nn.functional.pad(share, (0, size - share.numel()))


def whole_of(share: Tensor, like: nn.Parameter, ranks: Ranks) -> Tensor:
    """The inverse of `share_of`: a tensor of the shape of `like`. All ranks call it."""
    if not hasattr(like, "ds_tensor"):
        return share.view(like.shape)
    shares = [torch.empty_like(share) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(shares, share)
    whole: Tensor = torch.cat(shares)[: like.ds_numel].view(like.ds_shape)  # type: ignore[attr-defined]
    return whole


def write_share(parameter: nn.Parameter, share: Tensor) -> None:
    """Put what `share_of` cuts out into a parameter of a frozen model, sharded or not."""
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.data.copy_(share)
    else:
        parameter.data.copy_(share.view(parameter.shape))
