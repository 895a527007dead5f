"""The processes of a run: how they meet, wait for each other and part.

It reads what the launcher says; `config.launcher` only what is needed before torch is imported.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError
from mvd_scale.training.processors import Pinned, machine, settle


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and the device it trains on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)
    """Longest wait for another rank in a collective."""
    host: str = ""
    """Tells its host from the others of the job."""
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

    @property
    def data_rank(self) -> DataRank:
        """This rank as data loaders see it."""
        return DataRank(self.device, self.rank, self.world_size, self.cpus)


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
    deepspeed = import_deepspeed()

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
        host=_host(),
        pinned=settle(rank, threads) if kind == "cpu" else None,
    )


def _host() -> str:
    # Local ranks do not tell: DeepSpeed's launcher begins those of a host anywhere, after a host of another size.
    for number in ("CROSS_RANK", "GROUP_RANK"):
        if number in os.environ:
            return os.environ[number]
    return " ".join(machine())


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


def leave_ranks() -> None:
    """Say goodbye to the other ranks at the end of a run that went well."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def import_deepspeed() -> Any:
    """DeepSpeed, without what it says while it is imported."""
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
