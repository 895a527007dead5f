"""Stage 1 and stage 2: masked feature modelling of whatever targets the recipe names (Algorithm 1)."""

from __future__ import annotations

import logging

import torch

from mvd_scale.checkpoints.weights import start_encoder
from mvd_scale.config import Recipe
from mvd_scale.config.deepspeed import student_deepspeed
from mvd_scale.data.index import open_source
from mvd_scale.data.loader import ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling import steps_per_epoch
from mvd_scale.models import Student
from mvd_scale.targets import MaskedDistillation, Target
from mvd_scale.targets.load import load_targets, teacher_sides, weight_digests
from mvd_scale.training.ahead import Ahead, begin_ahead
from mvd_scale.training.device import kind_of, placement_of
from mvd_scale.training.engine import train_engine
from mvd_scale.training.fidelity import check_fidelity
from mvd_scale.training.loop import describe, finish, fit, resume
from mvd_scale.training.momentum import moving_averages, start_averages
from mvd_scale.training.observers import Observer, Observers, Pictures, Probe, open_probe
from mvd_scale.training.optim import parameter_groups
from mvd_scale.training.placement import teacher_precision
from mvd_scale.training.ranks import Ranks, first_decides, join_ranks, leave_ranks
from mvd_scale.training.run_folder import RunFolder
from mvd_scale.training.schedule import Schedule
from mvd_scale.training.snapshots import Snapshots, export_student
from mvd_scale.training.teachers import host_teachers

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
    schedule = Schedule(
        recipe.training, steps_per_epoch(manifest, recipe.data, recipe.training.global_batch), recipe.lr_batch
    )
    origin = {
        "videos": manifest.digest,
        "teachers": first_decides(ranks, "teachers", lambda: weight_digests(recipe)),
        "teacher precision": teacher_precision(recipe, kind_of(ranks.device)).value,
    }
    if first_decides(ranks, "finished", lambda: folder.finished_at(schedule.last_step, origin)):
        logger.info("%s is finished already: see %s", folder.path, folder.summary)
        return leave_ranks()

    torch.manual_seed(recipe.seed)
    targets = load_targets(recipe)
    placement = placement_of(recipe, targets, ranks)
    student = Student(
        recipe.model, {name: (recipe.targets[name].head_config, target.channels) for name, target in targets.items()}
    )
    if recipe.training.initial_encoder is not None:
        start_encoder(student.encoder, recipe.training.initial_encoder)
    start_averages(targets, student)
    first_decides(ranks, "fidelity", lambda: check_fidelity(targets, recipe, placement, manifest, ranks.device))
    host_teachers(targets, placement, ranks)
    groups = parameter_groups(student, recipe.training.weight_decay)
    engine = train_engine(student, groups, recipe, placement, ranks)
    averages = moving_averages(targets, engine, schedule, ranks)
    snapshots = Snapshots(
        folder, recipe, ranks, origin, schedule.steps_per_epoch, averages,
        lambda engine, where: export_student(engine, where, recipe, ranks),
    )  # fmt: skip
    start = resume(engine, snapshots, schedule, folder, ranks)
    describe(recipe, manifest, schedule, ranks)

    loader = ClipLoader(
        manifest,
        recipe.data,
        recipe.model,
        recipe.seed,
        global_batch=recipe.training.global_batch,
        micro_batch=placement.micro_batch.value,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        cpus=ranks.cpus,
        start_step=start,
        total_steps=schedule.last_step,
        sides=teacher_sides(recipe, targets),
        report=folder.quarantine,
    )
    observers = observers_of(recipe, manifest, targets, folder, ranks, schedule)
    objective = MaskedDistillation(targets)
    batches = Ahead(loader, begin_ahead(objective, placement, ranks.device))
    with loader:
        fit(engine, objective, batches, schedule, snapshots, observers, recipe, folder, ranks, start)
    finish(engine, snapshots, folder, ranks, schedule.last_step)
    leave_ranks()


def prepare(recipe: Recipe, folder: RunFolder) -> None:
    """Rank 0's part: see that the folder is free for this run, claim it, and index the videos if need be."""
    folder.check(recipe)
    folder.claim()
    folder.record(recipe, open_source(recipe.data, folder.index))
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
