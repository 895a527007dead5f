"""The only file that knows DeepSpeed: joining the ranks, the student's engine, sharded teachers.

It is also the only one that reads the launcher's environment.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvd_scale.config import Recipe, RunRecipe, TeacherConfig
from mvd_scale.config.deepspeed import student_deepspeed, teacher_deepspeed
from mvd_scale.config.training import FrozenPrecision, Precision
from mvd_scale.errors import UserError
from mvd_scale.models.blocks import checkpoint_gradients
from mvd_scale.models.eight_bit import to_eight_bits
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.momentum import Momentum
from mvd_scale.training.compilation import GATHERED, compile_blocks, compiles, speed_up_teacher, transformer_blocks
from mvd_scale.training.optim import build_optimizer
from mvd_scale.training.processors import Pinned, settle

logger = logging.getLogger("mvd_scale")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and the device it trains on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)
    """Longest wait for another rank in a collective."""
    pinned: Pinned | None = None
    """Where on its machine it runs; None on GPUs, where ranks stay where they were started."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0

    @property
    def cpus(self) -> int | None:
        """Number of CPUs that are this rank's; None on GPUs."""
        return len(self.pinned.share.cpus) if self.pinned else None


def choose_device(device: str) -> torch.device:
    """The kind of device that `auto`, `cuda` or `cpu` means here.

    Raises:
        UserError: no GPU where one was asked for, or another word.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"device is {device!r}: expected auto, cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU here; use `--device cpu` or see `mvd-scale env`")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        if device == "cuda":
            raise UserError("device is cuda, but DS_ACCELERATOR=cpu asks to leave the GPUs alone; unset one of them")
        device = "cpu"
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def join_ranks(device: str, timeout_minutes: float) -> Ranks:
    """Meet the other ranks of the job, or be the only one when no launcher started this process.

    On CPUs each rank then takes its share of its machine (`processors.settle`), with as many threads as OMP_NUM_THREADS
    says, or one for each core. On GPUs ranks stay where they were started: they compute little, and which CPUs are near
    a GPU is for who starts them to say (`torchrun --numa-binding`).

    Args:
        device: `auto`, `cuda` or `cpu`.
        timeout_minutes: longest wait for another rank in a collective.

    Raises:
        UserError: no GPU where one was asked for, the launcher's environment has gaps, the port is taken, or ranks did
            not show up.
    """
    kind = choose_device(device).type
    if "RANK" in os.environ:
        _check_environment()
    else:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        os.environ.update({key: str(value) for key, value in alone.items()})
    # DeepSpeed chooses its accelerator when it is first imported.
    os.environ["DS_ACCELERATOR"] = kind
    deepspeed = _import_deepspeed()

    local_rank = int(os.environ["LOCAL_RANK"])
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {local_rank} of this host has no GPU, as torch sees {torch.cuda.device_count()}: start fewer "
                "ranks, or set the device to cpu"
            )
        torch.cuda.set_device(local_rank)
    else:
        # Its shared-memory reductions would be compiled at the first start; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if kind == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks could not meet at {where}: {str(error).splitlines()[0]}. "
            "If the port is in use, choose another with `deepspeed --master_port`; "
            "otherwise see that every host reaches it"
        ) from error
    device_index = local_rank if kind == "cuda" else None
    rank = torch.distributed.get_rank()
    # torch has read it; what the launcher of the ranks set counts as the user's choice too.
    threads = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else None
    return Ranks(
        rank=rank,
        local_rank=local_rank,
        world_size=torch.distributed.get_world_size(),
        device=torch.device(kind, device_index) if device_index is not None else torch.device(kind),
        timeout=timedelta(minutes=timeout_minutes),
        pinned=settle(rank, threads) if kind == "cpu" else None,
    )


def _check_environment() -> None:
    names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(
            f"RANK is {os.environ['RANK']}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: "
            "start ranks with the `deepspeed` launcher, or set for each RANK, LOCAL_RANK (its number among those of "
            "its host; on Slurm $SLURM_LOCALID), WORLD_SIZE, MASTER_ADDR and MASTER_PORT; to run alone, unset RANK"
        )


def first_decides(ranks: Ranks, name: str, work: Callable[[], Any]) -> Any:
    """Do something on rank 0, however long it takes; all ranks return its result or raise its `UserError`.

    Rank 0 may use the CPUs of the others, which wait.

    Args:
        ranks: all of them call this.
        name: tells this decision from the others of the job.
        work: gives something that JSON can hold.
    """
    key = f"mvd_scale/decision/{name}"
    store = torch.distributed.distributed_c10d._get_default_store()
    if ranks.first:
        try:
            with ranks.pinned.lifted() if ranks.pinned else nullcontext():
                answer = {"result": work()}
        except UserError as error:
            answer = {"error": str(error)}
        except BaseException:
            # The others would wait for days.
            store.set(key, json.dumps({"error": f"rank 0 failed at {name!r}: its own message says why"}))
            raise
        store.set(key, json.dumps(answer))
    # Not a collective: those end after the collective timeout, and indexing a data set takes longer.
    store.wait([key], timedelta(days=7))
    answer = json.loads(store.get(key))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["result"]


def everybody_done(ranks: Ranks, name: str) -> None:
    """Wait until all ranks have come here, however long the slowest takes."""
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"mvd_scale/done/{name}/{ranks.rank}", "1")
    store.wait([f"mvd_scale/done/{name}/{rank}" for rank in range(ranks.world_size)], timedelta(days=7))


def gather_rows(mine: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks, one rank after the other; they may have different numbers of them. All ranks call it."""
    count = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.empty_like(count) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(counts, count)
    most = int(torch.cat(counts).max())
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def dtype_of(precision: Precision) -> torch.dtype:
    """Of weights in a precision."""
    return _DTYPES[precision]


def leave_ranks() -> None:
    """Say goodbye to the other ranks at the end of a run that went well."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


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
    obstacle = GATHERED if config["zero_optimization"]["stage"] == 3 else ""
    programs = compiles("training.compile", recipe.training.compile, ranks.device, obstacle)
    checkpoint_gradients(model, recipe.training.gradient_checkpointing)
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device") in ("cpu", "nvme")
    engine, *_ = _import_deepspeed().initialize(
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
    deepspeed = _import_deepspeed()
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
    firsts: list[int] = [0] * ranks.world_size
    torch.distributed.all_gather_object(firsts, ranks.rank - ranks.local_rank)
    hosts = {first: [rank for rank, other in enumerate(firsts) if other == first] for first in sorted(set(firsts))}
    if len(hosts) in (1, ranks.world_size):
        return None
    # Every rank takes part in making every group.
    groups = {first: torch.distributed.new_group(members, timeout=ranks.timeout) for first, members in hosts.items()}
    return groups[ranks.rank - ranks.local_rank]


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


def _import_deepspeed() -> Any:
    # Its import prints and logs at INFO; only warnings concern the user of a run.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
