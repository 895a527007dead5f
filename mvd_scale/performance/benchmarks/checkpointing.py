"""`mvd-scale bench checkpoint`: seconds that a save keeps the training waiting, until it is durable, and to resume."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from mvd_scale.config import Recipe
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed, run_on_rank0
from mvd_scale.performance.batches import BatchLoader
from mvd_scale.performance.bench_setup import bench_recipe, make_trainer
from mvd_scale.performance.report import Metric, Report, this_machine
from mvd_scale.run_dir import RunFolder
from mvd_scale.targets import build_targets
from mvd_scale.targets.build import init_teacher
from mvd_scale.training.checkpointing.checkpointer import Checkpointer, SavedModel
from mvd_scale.training.trainer import Trainer

_RECIPE = "pretrain/videomae_b_k400"
"""Recipe without teachers, which no checkpoint holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointReport(Report):
    """Seconds of each save and of one resume; the longest of all ranks."""

    kind: Literal["checkpoint"] = "checkpoint"
    size: str
    deepspeed: str
    precision: str
    ranks: int
    parameters: int
    gib: float
    """Size of a checkpoint on disk in GiB."""

    waiting: list[float]
    """Seconds that the training waits, by save."""

    durable: list[float]
    """Seconds from the begin of a save until all of it is on disk under its name, by save."""

    resuming: float
    """Seconds to check all bytes of the checkpoint and to load it; the files may be in memory still."""

    def setting(self) -> dict[str, Any]:
        """Return size, sharding, precision and number of ranks."""
        return {key: getattr(self, key) for key in ("size", "deepspeed", "precision", "ranks")}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield the medians of the saves, and the resume."""
        yield "the step waits, s", Metric(median(self.waiting))
        yield "durable, s", Metric(median(self.durable))
        yield "resume, s", Metric(self.resuming)
        yield "size, GiB", Metric(self.gib)

    def to_text(self) -> str:
        """Format as text, one line per figure."""
        return "\n".join(
            [
                f"{self.size}, {self.parameters / 1e6:.1f} M parameters in {self.precision}, {self.deepspeed}, "
                f"{self.ranks} ranks, {len(self.waiting)} saves",
                self.machine.title(),
                f"  on disk         {self.gib:.2f} GiB",
                f"  the step waits  {median(self.waiting):.2f} s (at most {max(self.waiting):.2f})",
                f"  durable         {median(self.durable):.2f} s (at most {max(self.durable):.2f})",
                f"  resume          {self.resuming:.2f} s",
            ]
        )


def measure_checkpoint(
    size: str, deepspeed: str, precision: Precision | None, device: str, *, saves: int, work: Path | None
) -> CheckpointReport:
    """Save the state of a model's training several times, and resume from it. All ranks of the job call it.

    Args:
        size: S, B, L or H.
        deepspeed: DeepSpeed file, see `training.deepspeed`.
        precision: precision of the model; fp16 on GPUs and float32 on CPUs if None.
        device: `auto`, `cuda` or `cpu`.
        saves: number of saves.
        work: folder to write to, which all ranks see; None for a temporary one.
    """
    ranks = init_distributed(device, timeout_minutes=10)
    overrides = ["--model.size", size, "--training.deepspeed", deepspeed]
    recipe = bench_recipe(_RECIPE, overrides, precision, ranks.world_size)
    targets = build_targets(recipe, lambda name: init_teacher(recipe, name))
    trainer = make_trainer(recipe, {"": targets}, ranks, BatchLoader(iter([])))
    folder = Path(run_on_rank0(ranks, "folder of the checkpoints", lambda: tempfile.mkdtemp(dir=work)))
    try:
        report = _measure(trainer, recipe, ranks, folder, saves)
        torch.distributed.barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(folder)
    destroy_distributed()
    return report


def _measure(trainer: Trainer, recipe: Recipe, ranks: Ranks, folder: Path, saves: int) -> CheckpointReport:
    seconds: list[tuple[float, float]] = []
    (model,) = trainer.models
    saved = SavedModel(RunFolder(folder), recipe, model)
    with Checkpointer([saved], recipe, ranks, 1) as checkpointer:
        for step in range(1, saves + 1):
            torch.distributed.barrier()
            started = time.perf_counter()
            checkpointer.save(step)
            waited = time.perf_counter() - started
            checkpointer.wait()
            seconds.append((waited, time.perf_counter() - started))
        torch.distributed.barrier()
        started = time.perf_counter()
        checkpointer.resume()
        resumed = time.perf_counter() - started
        written = sum(file.stat().st_size for file in max(saved.folder.checkpoints.iterdir()).iterdir())
    slowest = torch.tensor([*(value for save in seconds for value in save), resumed], dtype=torch.float64)
    slowest = slowest.to(ranks.device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    *times, resuming = slowest.tolist()
    return CheckpointReport(
        machine=this_machine(ranks.device),
        size=str(recipe.model.size),
        deepspeed=str(recipe.training.deepspeed),
        precision=recipe.training.precision,
        ranks=ranks.world_size,
        parameters=_parameters(trainer),
        gib=written / 2**30,
        waiting=times[::2],
        durable=times[1::2],
        resuming=resuming,
    )


def _parameters(trainer: Trainer) -> int:
    """Number of the model's parameters, sharded or not."""
    (model,) = trainer.models
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.engine.module.parameters())
