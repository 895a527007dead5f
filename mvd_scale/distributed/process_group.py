"""Process group of a run: its initialisation and destruction, and operations that synchronise its ranks.

This module reads the launcher's environment variables; `config.launcher` reads only those that are needed before torch
is imported.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from mvd_scale.config.launcher import check_environment, local_world_size
from mvd_scale.distributed.cpu_affinity import CpuBinding, bind_to_cpus, count_cpus
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.distributed.exchange import StoreExchange, answer_from_rank0
from mvd_scale.distributed.free_port import free_port
from mvd_scale.distributed.health.progress import Progress
from mvd_scale.distributed.rendezvous import choose_way, open_store, resolve_endpoint
from mvd_scale.errors import UserError
from mvd_scale.utils.machine import machine_id
from mvd_scale.utils.nvdec import Nvdec, query_nvdec, shared_nvdec

_GC_INTERVALS = (700, 10, 10)
"""Python's own intervals of garbage collection, which the command line lengthens for its start."""

_LONGEST_WORK = timedelta(days=7)
"""Longest wait for work that only some ranks do, such as the indexing of a data set by rank 0."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the job, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)
    """Longest wait for other ranks in a collective operation."""
    host: str = ""
    """Identifier of this host, unique in the job."""
    binding: CpuBinding | None = None
    """CPUs that this rank is bound to; None if ranks use GPUs, where the binding is not changed."""
    cpus: int | None = None
    """Number of CPUs for this rank and its data workers together; None to count those of this process."""
    nvdec: Nvdec | None = None
    """Capabilities of NVDEC that the GPUs of all ranks have; None if ranks use CPUs."""
    progress: Progress = field(default_factory=Progress)
    """Progress of this rank, which the watchdog reads."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes files."""
        return self.rank == 0

    @property
    def data_rank(self) -> DataRank:
        """Properties of this rank that data loaders need."""
        return DataRank(
            self.device,
            self.rank,
            self.world_size,
            self.cpus,
            self.nvdec,
            self.open_exchange if self.world_size > 1 else None,
        )

    def open_exchange(self) -> StoreExchange:
        """Open an exchange of messages over the store of the process group. All ranks must call it as often."""
        return StoreExchange(self.store, self.rank, self.world_size, self.timeout, self.host)

    @property
    def store(self) -> Any:
        """Store of the process group, by which ranks exchange short messages."""
        return _default_store()


def _default_store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def choose_device(device: str) -> torch.device:
    """Return the device that `auto`, `cuda` or `cpu` stands for on this machine.

    Raises:
        UserError: `cuda` without a GPU, or another value.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"device is {device!r}: expected auto, cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; use `--device cpu` or see `mvd-scale env`")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        if device == "cuda":
            raise UserError("device is cuda, but DS_ACCELERATOR=cpu forbids the use of GPUs; unset one of them")
        device = "cpu"
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def init_distributed(device: str, timeout_minutes: float) -> Ranks:
    """Initialise the process group of the job; without a launcher this process is the only rank.

    Ranks that compute on CPUs are then bound to their share of the machine (`cpu_affinity.bind_to_cpus`), with
    OMP_NUM_THREADS threads, or one per core. The binding of ranks with GPUs is not changed: they compute little on
    CPUs, and the launcher can bind them to the CPUs near their GPU (`torchrun --numa-binding`).

    Args:
        device: `auto`, `cuda` or `cpu`.
        timeout_minutes: longest wait for other ranks in a collective operation, in minutes.

    Raises:
        UserError: there is no GPU for this rank, the launcher's environment is incomplete, the port is in use, ranks
            did not connect in time, or MASTER_ADDR leads nowhere.
    """
    kind = choose_device(device).type
    if "RANK" in os.environ:
        check_environment()
    else:
        alone = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(host="127.0.0.1"),
        }
        os.environ.update({key: str(value) for key, value in alone.items()})
    # DeepSpeed chooses its accelerator at its first import.
    os.environ["DS_ACCELERATOR"] = kind
    if kind == "cuda":
        # NCCL's flight recorder, which the watchdog writes when a run hangs, must know the latest collectives.
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    deepspeed = import_deepspeed()
    # Modules live as long as the process: collections in the steps need not pass over them.
    gc.freeze()
    gc.set_threshold(*_GC_INTERVALS)

    local_rank = int(os.environ["LOCAL_RANK"])
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {local_rank} of this host has no GPU: torch finds {torch.cuda.device_count()}. Start fewer "
                "ranks, or set the device to cpu"
            )
        torch.cuda.set_device(local_rank)
    else:
        # DeepSpeed's shared-memory reductions would be compiled at the first start; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    own_device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    try:
        _join_group(own_device, timedelta(minutes=timeout_minutes))
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks could not connect at {where}: {str(error).splitlines()[0]}. "
            "If the port is in use, choose another with `deepspeed --master_port`; "
            "otherwise check that every host can reach this address"
        ) from error
    # DeepSpeed takes over a process group that stands.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    rank = torch.distributed.get_rank()
    # torch has read OMP_NUM_THREADS; a value that the launcher set counts as the user's choice too.
    threads = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else None
    timeout = timedelta(minutes=timeout_minutes)
    world_size = torch.distributed.get_world_size()
    exchange = StoreExchange(_default_store(), rank, world_size, timeout, place=" ".join(machine_id()))
    binding = bind_to_cpus(exchange, threads) if kind == "cpu" else None
    return Ranks(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        device=own_device,
        timeout=timeout,
        host=_host(),
        binding=binding,
        cpus=binding.share.budget if binding else count_cpus(exchange),
        nvdec=_common_nvdec(exchange, own_device) if kind == "cuda" else None,
    )


def _join_group(device: torch.device, timeout: timedelta) -> None:
    """Meet the other ranks at MASTER_ADDR and MASTER_PORT, and initialise the process group of torch if there is none.

    Raises:
        DistNetworkError, DistStoreError: the ranks did not meet.
        UserError: MASTER_ADDR is not known, cannot be reached from other hosts, or by no network interface.
    """
    if torch.distributed.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    endpoint = resolve_endpoint(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)
    choose_way(endpoint, os.environ, several_hosts=1 < world_size != local_world_size(1), device=device)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=open_store(endpoint, rank, world_size, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        # Bound to its device, NCCL connects at once and not in the first collective; a single rank has no peer.
        device_id=device if device.type == "cuda" and world_size > 1 else None,
    )


def _common_nvdec(exchange: StoreExchange, device: torch.device) -> Nvdec:
    """Capabilities of NVDEC that the GPUs of all ranks have. All ranks call it."""
    common = exchange.decide(
        "nvdec",
        query_nvdec(device).to_json(),
        lambda parts: shared_nvdec([Nvdec.from_json(part) for part in parts]).to_json(),
    )
    return Nvdec.from_json(common)


def _host() -> str:
    # Local ranks do not identify hosts: DeepSpeed's launcher allows hosts with different numbers of ranks.
    for number in ("CROSS_RANK", "GROUP_RANK"):
        if number in os.environ:
            return os.environ[number]
    return " ".join(machine_id())


def run_on_rank0(ranks: Ranks, name: str, work: Callable[[], Any], *, patience: int = 0) -> Any:
    """Run a function on rank 0; all ranks return its result or raise its `UserError`.

    The other ranks wait; meanwhile rank 0 may use their CPUs.

    Args:
        ranks: this process among all; all ranks must call this function.
        name: name of the call, unique in the job.
        work: function to run; its result must be serialisable as JSON.
        patience: factor on the time after which the watchdog takes it for a hang; 0 for any time.
    """

    def with_all_cpus() -> Any:
        with ranks.binding.lifted_to_all_cpus() if ranks.binding else nullcontext():
            return work()

    # The store, not a collective operation: its timeout would be too short for the indexing of a data set.
    with ranks.progress.passing(name, patience=patience):
        if not ranks.is_main:
            # Rank 0 enters the phase again after its work: until then it is the one that the others wait for.
            ranks.progress.enter(name, patience=patience)
        try:
            return answer_from_rank0(ranks.store, f"mvd_scale/{name}", ranks.rank, with_all_cpus, _LONGEST_WORK)
        finally:
            if ranks.is_main:
                ranks.progress.enter(name, patience=patience)


def barrier_via_store(ranks: Ranks, name: str) -> None:
    """Wait until all ranks have called this function with the same name; in contrast to a collective, up to 7 days."""
    exchange = StoreExchange(ranks.store, ranks.rank, ranks.world_size, _LONGEST_WORK)
    with ranks.progress.passing(name):
        exchange.wait_for_all(name)


def gather_rows(mine: Tensor, ranks: Ranks) -> Tensor:
    """Concatenate the rows (n, ...) of all ranks in the order of ranks. All ranks must call it.

    Ranks may have different numbers of rows: they are padded to the largest number for the collective operation.
    """
    count = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.empty_like(count) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(counts, count)
    most = int(torch.cat(counts).max())
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def count_collectives() -> int:
    """Number of collective operations that this rank has begun in all of its groups; does not synchronise."""
    count = 0
    groups: list[Any] = list(torch.distributed.distributed_c10d._world.pg_map)
    for group in groups:
        # Not every backend counts.
        with suppress(RuntimeError):
            count += group._get_sequence_number_for_group()
    return count


def destroy_distributed() -> None:
    """Wait for all ranks and destroy the process group, at the end of a successful run."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def import_deepspeed() -> Any:
    """Import DeepSpeed without the messages that it logs during the import."""
    # The import sets the level to INFO and logs at it; only warnings matter to the user of a run.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
