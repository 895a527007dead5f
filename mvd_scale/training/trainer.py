"""The training step and the training loop of every run: pre-training, distillation, fine-tuning and detection.

Benchmarks and profiles run the same steps with a timer attached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mvd_scale.config import RunRecipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.health.progress import FIRST_STEP_PATIENCE
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import Preempted
from mvd_scale.training.ema import ModelEma
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.metrics.meter import Meter, MicroBatchMetrics
from mvd_scale.training.nonfinite import NonfiniteError, NonfiniteSteps, smallest_loss_scale
from mvd_scale.training.optimizer import apply_schedule
from mvd_scale.training.preemption import PreemptionHandler
from mvd_scale.training.teachers.prefetch import TeacherPrefetcher

if TYPE_CHECKING:
    from mvd_scale.run_dir import RunFolder
    from mvd_scale.training.callbacks import CallbackList
    from mvd_scale.training.checkpointing.checkpointer import Checkpointer


class Objective(Protocol):
    """The loss that a run minimises."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of the loss terms that are logged in addition to the loss."""

    @property
    def teachers(self) -> Mapping[str, nn.Module]:
        """Frozen models that the loss calls, by name."""

    def __call__(self, engine: Any, batch: ClipBatch, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro batch and its detached terms by name; float32 scalars."""


class StepTimer(Protocol):
    """Timer of the parts of a training step."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Return a context manager that times its body as the part `name`."""

    def watch(self, name: str, module: nn.Module) -> None:
        """Register hooks that time every forward pass of a module as the part `name`."""


class NoTimer:
    """`StepTimer` that does nothing."""

    _nothing = nullcontext()

    def part(self, name: str) -> AbstractContextManager[None]:
        """Return a context manager that does nothing."""
        return self._nothing

    def watch(self, name: str, module: nn.Module) -> None:
        """Register no hooks."""


@dataclass(frozen=True)
class TrainedModel:
    """DeepSpeed engine of a model with the loss that it minimises."""

    engine: Any
    """Engine of `deepspeed.initialize`."""

    objective: Objective

    averages: Sequence[ModelEma] = ()
    """Moving averages of the weights, updated after every optimizer step."""


class Trainer:
    """Owner of a model in training: runs optimizer steps. All ranks create one and call its methods.

    Args:
        model: engine, loss and moving averages.
        batches: micro batches of this rank, starting with those of optimizer step `step`.
        schedule: learning rate and weight decay by step.
        recipe: recipe of the run: batch sizes, precision, seed and logging.
        ranks: this process among all.
        step: number of completed optimizer steps.
    """

    step: int
    """Number of completed optimizer steps."""

    batch: ClipBatch
    """Micro batch of the latest forward pass; unset before the first step."""

    def __init__(
        self,
        model: TrainedModel,
        batches: TeacherPrefetcher,
        schedule: Schedule,
        recipe: RunRecipe,
        ranks: Ranks,
        step: int = 0,
    ) -> None:
        self.engine, self.objective, self.averages = model.engine, model.objective, model.averages
        self.batches = batches
        self.schedule = schedule
        self.recipe = recipe
        self.ranks = ranks
        self.step = step
        self._timer: StepTimer = NoTimer()
        self._nonfinite = NonfiniteSteps(recipe, ranks)
        self._patience = FIRST_STEP_PATIENCE
        _, self.accumulation = recipe.micro_batch_and_accumulation(ranks.world_size)

    @property
    def part_names(self) -> list[str]:
        """Names of all parts that a step may have, in the order of tables."""
        teachers = [f"{name} teacher" for name in self.objective.teachers]
        return ["data wait", *teachers, "student forward", "backward", "optimizer", "moving average"]

    def attach(self, timer: StepTimer) -> None:
        """Time the parts of all following steps. A timer cannot be detached: its module hooks stay registered."""
        self._timer = timer
        self.batches.waiting = lambda: timer.part("data wait")
        for name, teacher in self.objective.teachers.items():
            timer.watch(f"{name} teacher", teacher)
        timer.watch("student forward", self.engine)

    def train_step(self) -> list[MicroBatchMetrics]:
        """Run one optimizer step without waiting for the device.

        Returns:
            metrics of the micro batches of this rank.

        Raises:
            StopIteration: the loader has no more batches.
            NonfiniteError: the gradients of several steps in a row are not finite; raised on all ranks.
        """
        apply_schedule(self.engine.optimizer, self.schedule, self.step)
        self._nonfinite.begin(self.engine)
        steps = [self._micro_step(micro) for micro in range(self.accumulation)]
        metrics = [metric for metric, _ in steps]
        self._nonfinite.check(self.engine, self.step, [(metric.loss, rows) for metric, rows in steps])
        if not self._nonfinite.in_a_row:
            for average in self.averages:
                with self._timer.part("moving average"):
                    average.update(self.step)
        self.step += 1
        self._patience = 1
        return metrics

    def _micro_step(self, micro: int) -> tuple[MicroBatchMetrics, Tensor]:
        """Run the forward and backward pass of one micro batch; DeepSpeed steps the optimizer after the last one.

        Returns:
            metrics, and the rows of the videos in the manifest, int64 (B,) on the host.
        """
        reseed(self.recipe, self.step, micro, self.ranks)
        self._enter("data wait")
        self.batch = next(self.batches)
        self._enter("forward")
        loss, parts = self.objective(self.engine, self.batch)
        self._enter("backward")
        with self._timer.part("backward"):
            self.engine.backward(loss)
        self._enter("optimizer")
        with self._timer.part("optimizer"), smallest_loss_scale(self.step):
            self.engine.step()
        metrics = MicroBatchMetrics(loss.detach(), parts, len(self.batch.pixels), self.batches.waited)
        return metrics, self.batch.video_ids

    def _enter(self, phase: str) -> None:
        self.ranks.progress.enter(phase, self.step, patience=self._patience)

    def train(self, folder: RunFolder, checkpointer: Checkpointer, callbacks: CallbackList) -> None:
        """Run all remaining steps.

        Args:
            folder: run folder, for the metrics.
            checkpointer: writer of checkpoints.
            callbacks: callbacks between optimizer steps.

        Raises:
            Preempted: the run received a stop signal and saved a checkpoint.
            UserError: see `train_step`.
        """
        # Benchmarks and the bring-up run steps without the packages that run folders need.
        from mvd_scale.training.metrics.writer import metric_writer

        recipe, last = self.recipe, self.schedule.last_step
        meter = Meter(list(self.objective.parts), self.ranks)
        self._nonfinite.folder = folder
        writer = metric_writer(folder, recipe, self.ranks, start_step=self.step, total_steps=last)
        with PreemptionHandler() as stop, writer, callbacks:
            while self.step < last:
                try:
                    meter.add_step(self.train_step())
                except NonfiniteError:
                    # All ranks are here, so that a checkpoint that is being written can be completed.
                    checkpointer.wait()
                    raise
                ended, stopping = self.step == last, stop.should_stop(self.ranks, self.step - 1)
                overdue = False
                # These phases belong to the step that has just been counted.
                self.ranks.progress.enter("metrics")
                if self.step % recipe.logging.every_steps == 0 or ended or stopping:
                    values, overdue = meter.read(checkpointer.time_to_save(), self.batches.substituted)
                    writer.write(self.step, values | self._optimizer_values())
                self.ranks.progress.enter("callbacks")
                callbacks.on_step_end(self.engine, self.step, writer)
                self.ranks.progress.enter("save")
                due = overdue or checkpointer.should_save(self.step)
                # While steps are skipped, the weights may be those that diverged: older checkpoints must stay.
                if (due and not self._nonfinite.in_a_row) or ended or stopping:
                    checkpointer.save(self.step)
                if stopping and not ended:
                    # The message of `Preempted` promises a checkpoint.
                    checkpointer.wait()
                    raise Preempted(stop.exit_code)

    def _optimizer_values(self) -> dict[str, float]:
        """Collect learning rate, weight decay, gradient norm, loss scale and skipped steps of the latest step."""
        engine, step = self.engine, self.step - 1
        norm = engine.get_global_grad_norm()
        return {
            "lr": self.schedule.lr(step),
            "weight_decay": self.schedule.weight_decay(step),
            "grad_norm": float("nan") if norm is None else float(norm),
            "loss_scale": float(engine.optimizer.loss_scale),
            "skipped_steps": float(engine.skipped_steps),
        }


def reseed(recipe: RunRecipe, step: int, micro: int, ranks: Ranks) -> None:
    """Seed torch by seed, step, micro batch and rank, so that a resumed run draws the same random numbers."""
    sequence = np.random.SeedSequence((recipe.seed, step, micro, ranks.rank))
    torch.manual_seed(int(sequence.generate_state(1)[0]))
