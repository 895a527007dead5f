"""`mvd-scale bench load`: time and host memory of loading a sharded teacher."""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil
import torch
from torch import nn

from mvd_scale.checkpoints.weights import load_encoder, save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.models import Encoder
from mvd_scale.performance.report import Metric, Report, this_machine
from mvd_scale.training.teachers.place import shard_teacher

_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport(Report):
    """Time in seconds and memory in MiB.

    Peaks are increases of the proportional set size (PSS), in which a page of the file that several ranks have mapped
    counts once in the sum over ranks.
    """

    kind: Literal["load"] = "load"
    size: str
    precision: str
    ranks: int
    parameters: int
    seconds: float
    one_copy: float
    largest_layer: float
    share: float
    held_after_loading: list[float]
    peak_per_rank: list[float]
    peak_of_all_ranks: float
    peak_over_one_copy: float

    def setting(self) -> dict[str, Any]:
        """Return size, precision and number of ranks."""
        return {key: getattr(self, key) for key in ("size", "precision", "ranks")}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield time, and memory of every rank and of all ranks."""
        yield "load time, s", Metric(self.seconds)
        for rank, (held, peak) in enumerate(zip(self.held_after_loading, self.peak_per_rank, strict=True)):
            yield f"rank {rank}: held, MiB", Metric(held)
            yield f"rank {rank}: peak, MiB", Metric(peak)
        yield "peak of all ranks, MiB", Metric(self.peak_of_all_ranks)

    def to_text(self) -> str:
        """Format as text, one line per figure."""
        return "\n".join(
            [
                f"{self.size} teacher, {self.parameters / 1e6:.1f} M parameters in {self.precision}, "
                f"{self.ranks} ranks, ZeRO-3, from memory-mapped safetensors",
                self.machine.title(),
                f"  load time                  {self.seconds:.1f} s",
                f"  one copy                   {self.one_copy:.0f} MiB, largest layer {self.largest_layer:.0f} MiB",
                f"  held after loading         {_each(self.held_after_loading)} MiB per rank, "
                f"1/ranks {self.share:.0f} MiB",
                f"  peak while loading         {_each(self.peak_per_rank)} MiB per rank",
                f"  peak of all ranks          {self.peak_of_all_ranks:.0f} MiB = "
                f"{self.peak_over_one_copy:.2f} times one copy",
            ]
        )


class MemoryWatch:
    """Context manager that samples the proportional set size (PSS) of this process in a background thread."""

    def __init__(self, every_seconds: float = 0.05) -> None:
        self.every_seconds = every_seconds
        self.process = psutil.Process()
        self.samples: list[tuple[float, float]] = []

    def __enter__(self) -> Self:
        self.before = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _now(self) -> float:
        return float(self.process.memory_full_info().pss) / _MIB

    def _sample(self) -> None:
        while not self._done.wait(self.every_seconds):
            self.samples.append((time.time(), self._now() - self.before))


def measure_load(size: str, precision: Precision, device: str) -> LoadReport:
    """Load a video teacher with random weights into ZeRO-3 shards on all ranks of the job.

    Args:
        size: S, B, L or H.
        precision: precision of the shards; the file contains float32.
        device: `auto`, `cuda` or `cpu`.
    """
    ranks = init_distributed(device, timeout_minutes=10)
    with tempfile.TemporaryDirectory() as scratch:
        file = [str(Path(scratch) / "teacher.safetensors")]
        if ranks.is_main:
            # In another process, so that this rank's memory contains only what it loads.
            writer = multiprocessing.get_context("spawn").Process(target=_write_teacher, args=(file[0], size))
            writer.start()
            writer.join()
        torch.distributed.broadcast_object_list(file)
        report = _measure(Path(file[0]), size, precision, ranks)
        torch.distributed.barrier()
    destroy_distributed()
    return report


def _write_teacher(file: str, size: str) -> None:
    config = ModelConfig.model_validate({"size": size, "positions": "sinusoid"})
    save_weights(Path(file), Encoder(config).state_dict(), config)


def _measure(file: Path, size: str, precision: Precision, ranks: Ranks) -> LoadReport:
    torch.distributed.barrier()
    started = time.perf_counter()
    with MemoryWatch() as watch:
        teacher = load_encoder(file, final_norm=False, mapped=True)
        parameters = sum(p.numel() for p in teacher.parameters())
        largest = max(sum(p.numel() for p in block.parameters()) for block in teacher.blocks)
        engine = shard_teacher(teacher, precision, ranks)
        torch.distributed.barrier()
        seconds = time.perf_counter() - started
    bytes_each = 4 if precision == "fp32" else 2
    mine: dict[str, Any] = {"held": bytes_each * held_at_rest(engine) / _MIB, "samples": watch.samples}
    everyone: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(everyone, mine)
    one_copy = bytes_each * parameters / _MIB
    together = _peak_together([rank["samples"] for rank in everyone])
    return LoadReport(
        machine=this_machine(ranks.device),
        size=size,
        precision=precision,
        ranks=ranks.world_size,
        parameters=parameters,
        seconds=seconds,
        one_copy=one_copy,
        largest_layer=bytes_each * largest / _MIB,
        share=one_copy / ranks.world_size,
        held_after_loading=[rank["held"] for rank in everyone],
        peak_per_rank=[max(used for _, used in rank["samples"]) for rank in everyone],
        peak_of_all_ranks=together,
        peak_over_one_copy=together / one_copy,
    )


def held_at_rest(module: nn.Module) -> int:
    """Number of parameter elements on this rank between forward passes: its shards and gathered parameters."""
    return sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0) for p in module.parameters())


def _peak_together(ranks: list[list[tuple[float, float]]]) -> float:
    """Largest sum over ranks at any moment, taking each rank's last sample before the moment."""
    events = sorted((moment, rank, used) for rank, samples in enumerate(ranks) for moment, used in samples)
    latest = [0.0] * len(ranks)
    peak = 0.0
    for _, rank, used in events:
        latest[rank] = used
        peak = max(peak, sum(latest))
    return peak


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)
