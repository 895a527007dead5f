"""The training step and the training loop of every run: pre-training, distillation, fine-tuning and detection.

Several students learn from each batch one after the other, each by its own engine; a run of one model is the same with
one. Benchmarks and profiles run the same steps with a timer attached.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mvd_scale.config import RunRecipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.health.progress import FIRST_STEP_PATIENCE
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import Preempted
from mvd_scale.training.metrics.meter import Meter, MicroBatchMetrics
from mvd_scale.training.nonfinite import NonfiniteError, NonfiniteSteps, smallest_loss_scale
from mvd_scale.training.optimizer import apply_schedule
from mvd_scale.training.preemption import PreemptionHandler
from mvd_scale.training.teachers.prefetch import TeacherPrefetcher
from mvd_scale.training.trained_model import TrainedModel

if TYPE_CHECKING:
    from mvd_scale.run_dir import RunFolder
    from mvd_scale.training.callbacks import CallbackList
    from mvd_scale.training.checkpointing.checkpointer import Checkpointer


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


class Trainer:
    """Owner of the models in training: runs optimizer steps. All ranks create one and call its methods.

    Args:
        models: engine, loss, schedule and moving averages of each model; several if the recipe names `students`. All
            have as many steps.
        batches: micro batches of this rank, starting with those of optimizer step `step`.
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
        models: Sequence[TrainedModel],
        batches: TeacherPrefetcher,
        recipe: RunRecipe,
        ranks: Ranks,
        step: int = 0,
    ) -> None:
        self.models = models
        self.batches = batches
        self.recipe = recipe
        self.ranks = ranks
        self.step = step
        self._timer: StepTimer = NoTimer()
        self._nonfinite = [NonfiniteSteps(recipe, ranks, model.name) for model in models]
        self._patience = FIRST_STEP_PATIENCE
        _, self.accumulation = recipe.micro_batch_and_accumulation(ranks.world_size)

    @property
    def part_names(self) -> list[str]:
        """Names of all parts that a step may have, in the order of tables."""
        own = ("student forward", "backward", "optimizer", "moving average")
        return ["data wait", *self._teachers, *(model.part(name) for model in self.models for name in own)]

    @property
    def _teachers(self) -> dict[str, nn.Module]:
        """Teachers by the name of their part; one that all students share is listed once."""
        pairs = [(name, model, teacher) for model in self.models for name, teacher in model.objective.teachers.items()]
        modules: dict[str, set[nn.Module]] = {}
        for name, _, teacher in pairs:
            modules.setdefault(name, set()).add(teacher)
        return {
            f"{name} teacher" if len(modules[name]) == 1 else model.part(f"{name} teacher"): teacher
            for name, model, teacher in pairs
        }

    def attach(self, timer: StepTimer) -> None:
        """Time the parts of all following steps. A timer cannot be detached: its module hooks stay registered."""
        self._timer = timer
        self.batches.waiting = lambda: timer.part("data wait")
        for name, teacher in self._teachers.items():
            timer.watch(name, teacher)
        for model in self.models:
            timer.watch(model.part("student forward"), model.engine)

    def train_step(self) -> list[MicroBatchMetrics]:
        """Run one optimizer step without waiting for the device.

        Returns:
            metrics of the micro batches of this rank.

        Raises:
            StopIteration: the loader has no more batches.
            NonfiniteError: the gradients of several steps in a row are not finite; raised on all ranks.
        """
        for model, nonfinite in zip(self.models, self._nonfinite, strict=True):
            apply_schedule(model.engine.optimizer, model.schedule, self.step)
            nonfinite.begin(model.engine)
        steps = [self._micro_step(micro) for micro in range(self.accumulation)]
        for model, nonfinite in zip(self.models, self._nonfinite, strict=True):
            losses = [(metrics.losses[f"{model.metrics}loss"], rows) for metrics, rows in steps]
            nonfinite.check(model.engine, self.step, losses)
            for average in model.averages:
                if nonfinite.in_a_row:
                    average.skip()
                    continue
                with self._timer.part(model.part("moving average")):
                    average.update(self.step)
        self.step += 1
        self._patience = 1
        return [metrics for metrics, _ in steps]

    def _micro_step(self, micro: int) -> tuple[MicroBatchMetrics, Tensor]:
        """Run the forward and backward passes of all models on one micro batch.

        Returns:
            metrics, and the rows of the videos in the manifest, int64 (B,) on the host.
        """
        self._enter("data wait")
        self.batch = next(self.batches)
        losses: dict[str, Tensor] = {}
        for model in self.models:
            # Each model draws the random numbers that it would draw alone.
            reseed(self.recipe, self.step, micro, self.ranks)
            losses |= self._learn(model)
        loss = torch.stack([losses[f"{model.metrics}loss"] for model in self.models]).sum()
        return MicroBatchMetrics(loss, losses, len(self.batch.pixels), self.batches.waited), self.batch.video_ids

    def _learn(self, model: TrainedModel) -> dict[str, Tensor]:
        """Run the passes of one model; DeepSpeed steps the optimizer after the last micro batch of a step.

        Returns:
            the loss and its terms by the names of their metrics.
        """
        self._enter("forward")
        loss, parts = model.objective(model.engine, self.batch)
        self._enter("backward")
        with self._timer.part(model.part("backward")):
            model.engine.backward(loss)
        self._enter("optimizer")
        with self._timer.part(model.part("optimizer")), smallest_loss_scale(self.step, model.name):
            model.engine.step()
        return dict(zip(model.losses, (loss.detach(), *(parts[part] for part in model.objective.parts)), strict=True))

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

        recipe, last = self.recipe, self.models[0].schedule.last_step
        meter = Meter([name for model in self.models for name in model.losses], self.ranks)
        for nonfinite in self._nonfinite:
            nonfinite.folder = folder
        writer = metric_writer(folder, recipe, self.ranks, start_step=self.step, total_steps=last)
        with PreemptionHandler() as stop, writer, callbacks:
            while self.step < last:
                try:
                    meter.add_step(self.train_step())
                except NonfiniteError:
                    # All ranks are here, so that a checkpoint that is being written can be completed.
                    checkpointer.wait_for_last()
                    raise
                ended = self.step == last
                stopping = stop.should_stop(self.ranks, self.step - 1, failed=checkpointer.has_failed)
                overdue = False
                # These phases belong to the step that has just been counted.
                self.ranks.progress.enter("metrics")
                if self.step % recipe.logging.every_steps == 0 or ended or stopping:
                    values, overdue = meter.read(checkpointer.time_to_save(), self.batches.substituted)
                    writer.write(self.step, values | self._optimizer_values())
                self.ranks.progress.enter("callbacks")
                callbacks.on_step_end(self.step, writer)
                self.ranks.progress.enter("save")
                due = overdue or checkpointer.should_save(self.step)
                # While steps are skipped, the weights may be those that diverged: older checkpoints must stay.
                if (due and not any(nonfinite.in_a_row for nonfinite in self._nonfinite)) or ended or stopping:
                    checkpointer.save(self.step)
                if stopping and not ended:
                    # The message of `Preempted` promises a checkpoint.
                    checkpointer.wait_for_last()
                    raise Preempted(stop.exit_code)

    def _optimizer_values(self) -> dict[str, float]:
        """Collect learning rate, weight decay, gradient norm, loss scale and skipped steps of the latest step."""
        values: dict[str, float] = {}
        for model in self.models:
            engine, schedule, step = model.engine, model.schedule, self.step - 1
            norm = engine.get_global_grad_norm()
            own = {
                "lr": schedule.lr(step),
                "weight_decay": schedule.weight_decay(step),
                "grad_norm": float("nan") if norm is None else float(norm),
                "loss_scale": float(engine.optimizer.loss_scale),
                "skipped_steps": float(engine.skipped_steps),
            }
            values |= {f"{model.metrics}{name}": value for name, value in own.items()}
        return values


def reseed(recipe: RunRecipe, step: int, micro: int, ranks: Ranks) -> None:
    """Seed torch by seed, step, micro batch and rank, so that a resumed run draws the same random numbers."""
    sequence = np.random.SeedSequence((recipe.seed, step, micro, ranks.rank))
    torch.manual_seed(int(sequence.generate_state(1)[0]))
