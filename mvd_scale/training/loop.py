"""The training loop of every run: pre-training, distillation and fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mvd_kernels import attention_backends
from mvd_scale.config import RunRecipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling import mixture_parts
from mvd_scale.errors import UserError
from mvd_scale.models.precision import dtype_of
from mvd_scale.training.ahead import Ahead
from mvd_scale.training.metrics import Meter, MetricWriter, drop_after, read_metrics
from mvd_scale.training.observers import Observers
from mvd_scale.training.optim import apply_schedule
from mvd_scale.training.ranks import Ranks
from mvd_scale.training.resilience import Stopped, StopRequest, check_finite
from mvd_scale.training.run_folder import RunFolder
from mvd_scale.training.schedule import Schedule
from mvd_scale.training.snapshots import Snapshots

logger = logging.getLogger("mvd_scale")


class Objective(Protocol):
    """What a run minimises."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of the numbers that are logged beside the loss."""

    def __call__(self, engine: Any, batch: ClipBatch, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro batch, and its parts, detached; float32 scalars."""


def fit(
    engine: Any,
    objective: Objective,
    batches: Ahead,
    schedule: Schedule,
    snapshots: Snapshots,
    observers: Observers,
    recipe: RunRecipe,
    folder: RunFolder,
    ranks: Ranks,
    start: int,
) -> None:
    """The training loop: optimizer steps `start` to the last."""
    _, accumulation = recipe.batch_split(ranks.world_size)
    meter = Meter(list(objective.parts), ranks)
    events = folder.tensorboard if recipe.logging.tensorboard else None
    writer = MetricWriter(folder.metrics, events, ranks, start_step=start, total_steps=schedule.last_step)
    with StopRequest() as stop, writer, observers:
        for step in range(start, schedule.last_step):
            apply_schedule(engine.optimizer, schedule, step)
            for micro in range(accumulation):
                reseed(recipe, step, micro, ranks)
                batch = next(batches)
                loss, distances = objective(engine, batch)
                engine.backward(loss)
                engine.step()
                meter.add(loss, distances, len(batch.pixels), batches.waited)
            check_finite(engine, recipe.training.precision, step)
            for average in snapshots.averages:
                average.update(step)

            done, overdue = step + 1, False
            last, stopping = done == schedule.last_step, stop.agreed(ranks, step)
            meter.steps += 1
            if done % recipe.logging.every_steps == 0 or last or stopping:
                values, overdue = meter.read(snapshots.overdue(), batches.substituted)
                writer.write(done, values | engine_values(engine, schedule, step))
            observers.observe(engine, done, writer)
            if overdue or snapshots.due(done) or last or stopping:
                snapshots.save(engine, done)
            if stopping and not last:
                raise Stopped(stop.exit_code)


def resume(engine: Any, snapshots: Snapshots, schedule: Schedule, folder: RunFolder, ranks: Ranks) -> int:
    """Go on from the newest checkpoint, and forget what a killed run did after it; the steps that are done.

    Raises:
        UserError: as `Snapshots.resume`, or there are more than the run shall have.
    """
    start = snapshots.resume(engine)
    if start > schedule.last_step:
        raise UserError(
            f"{folder.path} has come to step {start} already, beyond its last step {schedule.last_step}; "
            "raise training.max_steps, or begin a new run in another `--run.folder`"
        )
    if ranks.first:
        snapshots.clear_partial()
        drop_after(folder.validation, start)
    return start


def engine_values(engine: Any, schedule: Schedule, step: int) -> dict[str, float]:
    """What the optimizer used at a step, as floats."""
    norm = engine.get_global_grad_norm()
    return {
        "lr": schedule.lr(step),
        "weight_decay": schedule.weight_decay(step),
        "grad_norm": float("nan") if norm is None else float(norm),
        "loss_scale": float(engine.optimizer.loss_scale),
        "skipped_steps": float(engine.skipped_steps),
    }


def reseed(recipe: RunRecipe, step: int, micro: int, ranks: Ranks) -> None:
    """Make what is drawn in a step a function of its place in the run, so that a resumed run draws the same."""
    place = np.random.SeedSequence((recipe.seed, step, micro, ranks.rank))
    torch.manual_seed(int(place.generate_state(1)[0]))


def describe(recipe: RunRecipe, manifest: Manifest, schedule: Schedule, ranks: Ranks, rows: str = "videos") -> None:
    """Log what is about to run; `rows` says what a row of the manifest is."""
    micro, accumulation = recipe.batch_split(ranks.world_size)
    clips = recipe.data.copies * sum(part.clips for part in mixture_parts(manifest, recipe.data))
    remainder = clips - schedule.steps_per_epoch * recipe.training.global_batch
    logger.info(
        "%s: %d ranks on %s, %s, %s; global batch %d = %d ranks x %d clips x %d accumulation",
        recipe.run.folder,
        ranks.world_size,
        ranks.device.type,
        recipe.training.deepspeed,
        recipe.training.precision,
        recipe.training.global_batch,
        ranks.world_size,
        micro,
        accumulation,
    )
    logger.info("attention of the student: %s", _attention(recipe, ranks))
    short = int((manifest.frames[manifest.usable] < recipe.model.frames * recipe.data.stride).sum())
    if short and recipe.data.sampling != "segments":
        logger.info("%d %s are of videos shorter than a clip: frames are repeated", short, rows)
    logger.info(
        "%d %s, %d left out; %d steps of an epoch, %d clips of it unused; %d steps in all",
        len(manifest.usable),
        rows,
        len(manifest) - len(manifest.usable),
        schedule.steps_per_epoch,
        remainder,
        schedule.last_step,
    )


def _attention(recipe: RunRecipe, ranks: Ranks) -> str:
    """Its implementations in the order of preference, up to the one that is taken, each other one with its reason."""
    assert recipe.model.width is not None
    assert recipe.model.heads is not None
    channels = recipe.model.width // recipe.model.heads
    reasons = attention_backends(ranks.device, dtype_of(recipe.training.precision), channels)
    return ", ".join(f"{name} ({reason})" if reason else name for name, reason in reasons.items())


def finish(engine: Any, snapshots: Snapshots, folder: RunFolder, ranks: Ranks, step: int) -> None:
    """Export the weights and leave the figures of the run."""
    snapshots.export(engine, folder.path)
    if ranks.first:
        readings = read_metrics(folder.metrics)
        folder.finish({"steps": step, "origin": snapshots.origin, "first": readings[0], "last": readings[-1]})
        logger.info("finished: %s", folder.path)
