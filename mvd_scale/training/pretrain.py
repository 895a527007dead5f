"""Stage 1 and stage 2: masked feature modelling of whatever targets the recipe names (Algorithm 1)."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch

from mvd_scale.capabilities import probe, table
from mvd_scale.checkpoints.weights import start_encoder
from mvd_scale.config import Recipe
from mvd_scale.config.deepspeed import student_deepspeed
from mvd_scale.data.index import open_source
from mvd_scale.data.loader import ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling import mixture_parts, steps_per_epoch
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.targets import MaskedDistillation, Target
from mvd_scale.targets.load import load_targets, teacher_sides, weight_digests
from mvd_scale.training.engine import (
    Ranks,
    first_decides,
    host_teachers,
    join_ranks,
    leave_ranks,
    student_engine,
    teacher_precision,
)
from mvd_scale.training.metrics import Meter, MetricWriter, read_metrics
from mvd_scale.training.momentum import moving_averages, start_averages
from mvd_scale.training.observers import Observer, Observers, Pictures, Probe, open_probe
from mvd_scale.training.optim import apply_schedule
from mvd_scale.training.resilience import Stopped, StopRequest, check_finite
from mvd_scale.training.run_folder import RunFolder, write_whole
from mvd_scale.training.schedule import Schedule
from mvd_scale.training.snapshots import Snapshots

logger = logging.getLogger("mvd_scale")


def pretrain(recipe: Recipe) -> None:
    """Run a recipe from its start, or from its newest checkpoint, to its end.

    Raises:
        UserError: something that the user can mend; nothing was overwritten.
        Stopped: the run was asked to stop; it was saved.
    """
    folder = RunFolder(recipe.run.folder)
    ranks = join_ranks(recipe.device, recipe.training.collective_timeout_minutes)
    student_deepspeed(recipe, ranks.world_size)
    first_decides(ranks, "prepared", lambda: prepare(recipe, folder))
    manifest = Manifest.load(folder.manifest)
    schedule = Schedule(recipe.training, steps_per_epoch(manifest, recipe.data, recipe.training.global_batch))
    if first_decides(ranks, "finished", lambda: folder.finished_at(schedule.last_step)):
        logger.info("%s is finished already: see %s", folder.path, folder.summary)
        return leave_ranks()

    torch.manual_seed(recipe.seed)
    targets = load_targets(recipe)
    student = Student(
        recipe.model, {name: (recipe.targets[name].head_config, target.channels) for name, target in targets.items()}
    )
    if recipe.training.initial_encoder is not None:
        start_encoder(student.encoder, recipe.training.initial_encoder)
    start_averages(targets, student)
    host_teachers(targets, recipe, ranks)
    engine = student_engine(student, recipe, ranks)
    averages = moving_averages(targets, engine, schedule, ranks)
    origin = {
        "videos": manifest.digest,
        "teachers": first_decides(ranks, "teachers", lambda: weight_digests(recipe)),
        "teacher precision": teacher_precision(recipe, ranks.device),
    }
    snapshots = Snapshots(folder, recipe, ranks, origin, schedule.steps_per_epoch, averages)
    start = snapshots.resume(engine)
    if start > schedule.last_step:
        raise UserError(
            f"{folder.path} has come to step {start} already, beyond training.max_steps {recipe.training.max_steps}; "
            "raise training.max_steps, or begin a new run in another `--run.folder`"
        )
    if ranks.first:
        snapshots.clear_partial()
    describe(recipe, manifest, schedule, ranks)

    loader = ClipLoader(
        manifest,
        recipe.data,
        recipe.model,
        recipe.seed,
        global_batch=recipe.training.global_batch,
        micro_batch=recipe.batch_split(ranks.world_size)[0],
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        start_step=start,
        total_steps=schedule.last_step,
        sides=teacher_sides(recipe, targets),
        report=folder.quarantine,
    )
    observers = observers_of(recipe, manifest, targets, folder, ranks, schedule)
    with loader:
        fit(engine, MaskedDistillation(targets), loader, schedule, snapshots, observers, recipe, folder, ranks, start)
    finish(engine, snapshots, folder, ranks, schedule.last_step)
    leave_ranks()


def fit(
    engine: Any,
    objective: MaskedDistillation,
    loader: ClipLoader,
    schedule: Schedule,
    snapshots: Snapshots,
    observers: Observers,
    recipe: Recipe,
    folder: RunFolder,
    ranks: Ranks,
    start: int,
) -> None:
    """The training loop: optimizer steps `start` to the last."""
    _, accumulation = recipe.batch_split(ranks.world_size)
    meter = Meter(list(objective.targets), ranks)
    events = folder.tensorboard if recipe.logging.tensorboard else None
    writer = MetricWriter(folder.metrics, events, ranks, start_step=start, total_steps=schedule.last_step)
    with StopRequest() as stop, writer, observers:
        for step in range(start, schedule.last_step):
            apply_schedule(engine.optimizer, schedule, step)
            for micro in range(accumulation):
                reseed(recipe, step, micro, ranks)
                asked = time.perf_counter()
                batch = next(loader)
                waited = time.perf_counter() - asked
                loss, distances = objective(engine, batch)
                engine.backward(loss)
                engine.step()
                meter.add(loss, distances, len(batch.pixels), waited)
            check_finite(engine, recipe.training.precision, step)
            for average in snapshots.averages:
                average.update(step)

            done, overdue = step + 1, False
            last, stopping = done == schedule.last_step, stop.agreed(ranks, step)
            meter.steps += 1
            if done % recipe.logging.every_steps == 0 or last or stopping:
                values, overdue = meter.read(snapshots.overdue(), loader.substituted)
                writer.write(done, values | engine_values(engine, schedule, step))
            observers.observe(engine, done, writer)
            if overdue or snapshots.due(done) or last or stopping:
                snapshots.save(engine, done)
            if stopping and not last:
                raise Stopped(stop.exit_code)


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


def reseed(recipe: Recipe, step: int, micro: int, ranks: Ranks) -> None:
    """Make stochastic depth a pure function of the place in the run, so that a resumed run draws the same."""
    if recipe.model.drop_path:
        place = np.random.SeedSequence((recipe.seed, step, micro, ranks.rank))
        torch.manual_seed(int(place.generate_state(1)[0]))


def prepare(recipe: Recipe, folder: RunFolder) -> None:
    """Rank 0's part: see that the folder is free for this run, claim it, and index the videos if need be."""
    folder.check(recipe)
    folder.claim(recipe)
    write_whole(folder.environment, table(probe()) + "\n")
    manifest = open_source(recipe.data, folder.path)
    manifest.save(folder.manifest)
    if recipe.logging.probe is not None:
        open_probe(recipe.logging.probe, folder)


def observers_of(
    recipe: Recipe,
    manifest: Manifest,
    targets: dict[str, Target],
    folder: RunFolder,
    ranks: Ranks,
    schedule: Schedule,
) -> Observers:
    """The observers that a recipe asks for."""
    observers: list[Observer] = []
    if recipe.logging.pictures is not None:
        observers.append(Pictures(recipe, manifest, targets, folder, ranks, schedule.steps_per_epoch))
    if recipe.logging.probe is not None:
        observers.append(Probe(recipe, folder, ranks, schedule.steps_per_epoch))
    return Observers(observers)


def describe(recipe: Recipe, manifest: Manifest, schedule: Schedule, ranks: Ranks) -> None:
    """Log what is about to run."""
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
    short = int((manifest.frames[manifest.usable] < recipe.model.frames * recipe.data.stride).sum())
    if short:
        logger.info("%d videos are shorter than a clip: their last frame is repeated", short)
    logger.info(
        "%d videos, %d left out; %d steps of an epoch, %d clips of it unused; %d steps in all",
        len(manifest.usable),
        len(manifest) - len(manifest.usable),
        schedule.steps_per_epoch,
        remainder,
        schedule.last_step,
    )


def finish(engine: Any, snapshots: Snapshots, folder: RunFolder, ranks: Ranks, step: int) -> None:
    """Export the weights and leave the figures of the run."""
    snapshots.export(engine, folder.path)
    if ranks.first:
        readings = read_metrics(folder.metrics)
        folder.finish({"steps": step, "first": readings[0], "last": readings[-1]})
        logger.info("finished: %s", folder.encoder)
