"""Metrics of a run: summed on the device, averaged over ranks every few steps, written by rank 0.

`Meter.read` is the only operation of the training loop that makes the host wait for the device.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mvd_scale.distributed.process_group import Ranks
from mvd_scale.utils.io import truncate_metrics
from mvd_scale.utils.memory import peak_memory_gib

logger = logging.getLogger("mvd_scale")


class MicroBatchMetrics(NamedTuple):
    """Metrics of one micro batch of this rank. Tensors stay on the device, so that the host does not wait for them."""

    loss: Tensor
    """Float32 scalar, detached."""

    parts: dict[str, Tensor]
    """Terms of the objective by name, float32 scalars, detached."""

    clips: int
    """Number of clips, counting every copy."""

    waited: float
    """Seconds that the host waited for data."""


class Meter:
    """Accumulator of metrics between two readings.

    Args:
        targets: names of the objective's terms.
        ranks: this process among all.
    """

    def __init__(self, targets: list[str], ranks: Ranks) -> None:
        self.targets = targets
        self.ranks = ranks
        self._reset()

    def _reset(self) -> None:
        self.distances = torch.zeros(len(self.targets) + 1, device=self.ranks.device, dtype=torch.float64)
        self.micro_batches = 0
        self.clips = 0
        self.steps = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def add_step(self, micro_batches: Sequence[MicroBatchMetrics]) -> None:
        """Add the metrics of all micro batches of an optimizer step."""
        for micro in micro_batches:
            self.distances += torch.stack([micro.loss, *(micro.parts[name] for name in self.targets)])
            self.clips += micro.clips
            self.waited += micro.waited
        self.micro_batches += len(micro_batches)
        self.steps += 1

    def read(self, overdue: bool, replaced: int) -> tuple[dict[str, float], bool]:
        """Average the metrics since the last reading over all ranks, and reset them. All ranks must call it.

        Args:
            overdue: whether a checkpoint is overdue by this rank's clock.
            replaced: number of this rank's clips so far that were replaced because their video could not be decoded.

        Returns:
            metrics by name, and whether a checkpoint is overdue on any rank.
        """
        elapsed = time.perf_counter() - self.started
        mine = self.distances.new_tensor(
            [float(replaced), float(overdue), self.waited, peak_memory_gib(self.ranks.device)]
        )
        sums, worst = torch.cat([self.distances / self.micro_batches, mine[:1]]), mine[1:]
        # Reductions: their size does not depend on the number of ranks.
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        *totals, replaced_by_all, any_overdue, waited, memory = torch.cat([sums, worst]).tolist()
        names = ["loss", *(f"loss/{name}" for name in self.targets)]
        values = {name: total / self.ranks.world_size for name, total in zip(names, totals, strict=True)}
        values["clips_per_second"] = self.clips * self.ranks.world_size / elapsed
        values["seconds_per_step"] = elapsed / self.steps
        values["data_wait_share"] = waited / elapsed
        values["memory_gib"] = memory
        values["clips_replaced"] = replaced_by_all
        self._reset()
        return values, any_overdue > 0


class MetricWriter:
    """Writer of metrics to `metrics.jsonl`, TensorBoard and the terminal; does nothing on ranks other than 0.

    Args:
        path: file `metrics.jsonl`; lines after `start_step` are removed on entry.
        tensorboard: folder for TensorBoard events; None for none.
        ranks: this process among all.
        start_step: number of completed optimizer steps.
        total_steps: last step of the run.
    """

    def __init__(
        self, path: Path, tensorboard: Path | None, ranks: Ranks, *, start_step: int, total_steps: int
    ) -> None:
        self.active = ranks.is_main
        self.total_steps = total_steps
        self.start_step = start_step
        self.path = path
        self.tensorboard = tensorboard

    def __enter__(self) -> Self:
        if self.active:
            truncate_metrics(self.path, self.start_step)
            self.file = self.path.open("a", encoding="utf-8")
            self.events = None
            if self.tensorboard is not None:
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(str(self.tensorboard), purge_step=self.start_step + 1)
            self.bar = _progress_bar()
            self.task = self.bar.add_task("training", total=self.total_steps, completed=self.start_step, numbers="")
            if self.bar.console.is_terminal:
                self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.stop()
            self.file.close()
            if self.events is not None:
                self.events.close()

    def show(self, step: int, name: str, value: float | NDArray[np.uint8]) -> None:
        """Write a number or an image uint8 (H, W, 3) to TensorBoard; may be called from another thread."""
        if not self.active or self.events is None:
            return
        if isinstance(value, float):
            self.events.add_scalar(name, value, step)
        else:
            self.events.add_image(name, value, step, dataformats="HWC")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics that were read after `step` optimizer steps."""
        if not self.active:
            return
        # JSON cannot represent infinity, the gradient norm of a step that overflowed.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        json.dump({"step": step, **finite}, self.file)
        self.file.write("\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        numbers = _one_line(values)
        self.bar.update(self.task, completed=step, numbers=numbers)
        if not self.bar.console.is_terminal:
            remaining = (self.total_steps - step) * values["seconds_per_step"]
            logger.info("step %d/%d  %s  ETA %s", step, self.total_steps, numbers, _duration(remaining))


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )


def _one_line(values: dict[str, float]) -> str:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.partition("/")[0] == "loss")
    speed = f"{values['clips_per_second']:.1f} clips/s  wait {values['data_wait_share']:.0%}"
    optimizer = f"lr {values['lr']:.2e}  norm {values['grad_norm']:.2g}  scale {values['loss_scale']:g}"
    return f"{losses.replace('loss/', '')}  {optimizer}  {speed}  {values['memory_gib']:.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
