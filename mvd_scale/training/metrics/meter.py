"""Sums of metrics on the device, and their average over ranks every few steps.

`Meter.read` is the only operation of the training loop that makes the host wait for the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mvd_scale.distributed.process_group import Ranks
from mvd_scale.utils.memory import peak_memory_gib


class MicroBatchMetrics(NamedTuple):
    """Metrics of one micro batch of this rank. Tensors stay on the device, so that the host does not wait for them."""

    loss: Tensor
    """Loss, of several students the sum of their losses: float32 scalar, detached."""

    losses: dict[str, Tensor]
    """Losses and their terms by the name of the metric, see `TrainedModel.metrics`: float32 scalars, detached."""

    clips: int
    """Number of clips, counting every copy."""

    waited: float
    """Seconds that the host waited for data."""


class Meter:
    """Accumulator of metrics between two readings.

    Args:
        losses: names of losses and of their terms.
        ranks: this process among all.
    """

    def __init__(self, losses: list[str], ranks: Ranks) -> None:
        self.losses = losses
        self.ranks = ranks
        self._reset()

    def _reset(self) -> None:
        self.sums = torch.zeros(len(self.losses), device=self.ranks.device, dtype=torch.float64)
        self.micro_batches = 0
        self.clips = 0
        self.steps = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def add_step(self, micro_batches: Sequence[MicroBatchMetrics]) -> None:
        """Add the metrics of all micro batches of an optimizer step."""
        for micro in micro_batches:
            self.sums += torch.stack([micro.losses[name] for name in self.losses])
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
        mine = self.sums.new_tensor([float(replaced), float(overdue), self.waited, peak_memory_gib(self.ranks.device)])
        sums, worst = torch.cat([self.sums / self.micro_batches, mine[:1]]), mine[1:]
        # Reductions: their size does not depend on the number of ranks.
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        *totals, replaced_by_all, any_overdue, waited, memory = torch.cat([sums, worst]).tolist()
        values = {name: total / self.ranks.world_size for name, total in zip(self.losses, totals, strict=True)}
        values["clips_per_second"] = self.clips * self.ranks.world_size / elapsed
        values["seconds_per_step"] = elapsed / self.steps
        values["data_wait_share"] = waited / elapsed
        values["memory_gib"] = memory
        values["clips_replaced"] = replaced_by_all
        self._reset()
        return values, any_overdue > 0
