"""Learning rate and weight decay as pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mvd_scale.config import TrainingConfig


def cosine_schedule(
    step: int, *, total: int, start: float, end: float, warmup: int = 0, endpoint: bool = True
) -> float:
    """Compute a linear warm-up from 0 followed by half a cosine, as in the published schedules.

    Args:
        step: optimizer step, from 0.
        total: number of steps of the schedule.
        start: value at the end of the warm-up.
        end: value at step `total`.
        warmup: number of warm-up steps.
        endpoint: whether the last warm-up step has the value `start` already (MVD, VideoMAE), or only the step after it
            (MAE).
    """
    if step < warmup:
        return start * step / max(warmup - endpoint, 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay at each optimizer step of a run."""

    training: TrainingConfig
    steps_per_epoch: int
    lr_batch: int
    """Number of clips per step that the learning rate is scaled with."""

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of all epochs."""
        return self.training.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Number of optimizer steps after which the run ends."""
        return min(self.total_steps, self.training.max_steps or self.total_steps)

    def lr(self, step: int) -> float:
        """Learning rate at a step, scaled by `lr_batch` / 256."""
        scale = self.lr_batch / 256
        return cosine_schedule(
            step,
            total=self.total_steps,
            start=self.training.base_lr * scale,
            end=self.training.min_lr * scale,
            warmup=int(self.training.warmup_epochs * self.steps_per_epoch),
            endpoint=self.training.warmup_endpoint,
        )

    def weight_decay(self, step: int) -> float:
        """Weight decay at a step, for groups with weight decay."""
        first, last = self.training.weight_decay, self.training.weight_decay_end
        return first if last is None else cosine_schedule(step, total=self.total_steps, start=first, end=last)
