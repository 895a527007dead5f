"""The training step and the training loop of every run: pre-training, distillation, fine-tuning and detection.

Benchmarks and profiles make the same steps, with a timer that is told of their parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mvd_scale.config import RunRecipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.callbacks import CallbackList
from mvd_scale.training.checkpointer import Checkpointer
from mvd_scale.training.ema import ModelEma
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.metrics import Meter, MetricWriter, MicroBatchMetrics
from mvd_scale.training.optimizer import apply_schedule
from mvd_scale.training.preemption import Preempted, PreemptionHandler, check_finite
from mvd_scale.training.teachers.prefetch import TeacherPrefetcher


class Objective(Protocol):
    """The loss that a run minimises."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of the numbers that are logged beside the loss."""

    @property
    def teachers(self) -> Mapping[str, nn.Module]:
        """Frozen models that are called for the loss, by name."""

    def __call__(self, engine: Any, batch: ClipBatch, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro batch, and its parts, detached; float32 scalars."""


class StepTimer(Protocol):
    """Told when each part of a training step begins and ends."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Enter around a part."""

    def watch(self, name: str, module: nn.Module) -> None:
        """Take every forward pass of a module as a part."""


class NoTimer:
    """The `StepTimer` of steps that nobody times: it does nothing."""

    _nothing = nullcontext()

    def part(self, name: str) -> AbstractContextManager[None]:
        """Enter around a part."""
        return self._nothing

    def watch(self, name: str, module: nn.Module) -> None:
        """Leave the module alone."""


@dataclass(frozen=True)
class TrainedModel:
    """A model under DeepSpeed with the loss that it minimises."""

    engine: Any

    objective: Objective

    averages: Sequence[ModelEma] = ()
    """Moving averages of its weights, each moved after every optimizer step."""


class Trainer:
    """The owner of a model in training.

    Args:
        model: what is trained.
        batches: micro batches of this rank, from optimizer step `step` on.
        schedule: learning rate and weight decay by step.
        recipe: batch, precision, seed and logging.
        ranks: all of them make one and call its methods.
        step: optimizer steps that are done.
    """

    step: int
    """Optimizer steps that are done."""

    batch: ClipBatch
    """The micro batch that was last taken; there is none before the first step."""

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
        _, self.accumulation = recipe.micro_batch_and_accumulation(ranks.world_size)

    @property
    def part_names(self) -> list[str]:
        """All parts that a step may have, as tables list them."""
        teachers = [f"{name} teacher" for name in self.objective.teachers]
        return ["data wait", *teachers, "student forward", "backward", "optimizer", "moving average"]

    def attach(self, timer: StepTimer) -> None:
        """Tell a timer of the parts of every step from here on. It stays for good: modules are watched by hooks."""
        self._timer = timer
        self.batches.waiting = lambda: timer.part("data wait")
        for name, teacher in self.objective.teachers.items():
            timer.watch(f"{name} teacher", teacher)
        timer.watch("student forward", self.engine)

    def train_step(self) -> list[MicroBatchMetrics]:
        """Make one optimizer step. The host does not wait for the device.

        Returns:
            figures of its micro batches.

        Raises:
            StopIteration: there are no more batches.
            UserError: on all ranks alike, the gradients are not finite on one of them; no weight was touched.
        """
        apply_schedule(self.engine.optimizer, self.schedule, self.step)
        figures = [self._micro_step(micro) for micro in range(self.accumulation)]
        check_finite(self.engine, self.recipe.training.precision, self.step)
        for average in self.averages:
            with self._timer.part("moving average"):
                average.update(self.step)
        self.step += 1
        return figures

    def _micro_step(self, micro: int) -> MicroBatchMetrics:
        """Forward and backward pass of one micro batch; DeepSpeed steps its optimizer at the last one."""
        reseed(self.recipe, self.step, micro, self.ranks)
        self.batch = next(self.batches)
        loss, parts = self.objective(self.engine, self.batch)
        with self._timer.part("backward"):
            self.engine.backward(loss)
        with self._timer.part("optimizer"):
            self.engine.step()
        return MicroBatchMetrics(loss.detach(), parts, len(self.batch.pixels), self.batches.waited)

    def train(self, folder: RunFolder, checkpointer: Checkpointer, callbacks: CallbackList) -> None:
        """Make the steps that are left.

        Args:
            folder: gets the metrics.
            snapshots: saves the run.
            observers: look at the model between two steps.

        Raises:
            Stopped: the run was asked to stop; it was saved.
            UserError: as `train_step`.
        """
        recipe, last = self.recipe, self.schedule.last_step
        meter = Meter(list(self.objective.parts), self.ranks)
        events = folder.tensorboard if recipe.logging.tensorboard else None
        writer = MetricWriter(folder.metrics, events, self.ranks, start_step=self.step, total_steps=last)
        with PreemptionHandler() as stop, writer, callbacks:
            while self.step < last:
                meter.add_step(self.train_step())
                ended, stopping = self.step == last, stop.should_stop(self.ranks, self.step - 1)
                overdue = False
                if self.step % recipe.logging.every_steps == 0 or ended or stopping:
                    values, overdue = meter.read(checkpointer.time_to_save(), self.batches.substituted)
                    writer.write(self.step, values | self._optimizer_values())
                callbacks.on_step_end(self.engine, self.step, writer)
                if overdue or checkpointer.should_save(self.step) or ended or stopping:
                    checkpointer.save(self.engine, self.step)
                if stopping and not ended:
                    raise Preempted(stop.exit_code)

    def _optimizer_values(self) -> dict[str, float]:
        """Figures of the optimizer at the last step."""
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
    """Make what is drawn in a step a function of its place in the run, so that a resumed run draws the same."""
    place = np.random.SeedSequence((recipe.seed, step, micro, ranks.rank))
    torch.manual_seed(int(place.generate_state(1)[0]))
