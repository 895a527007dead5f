"""Stage 3: a pre-trained encoder learns to name the classes of labelled videos (Sec. 4.2)."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvd_scale.capabilities import probe, table
from mvd_scale.checkpoints.reading import digest
from mvd_scale.checkpoints.weights import save_weights, start_encoder
from mvd_scale.config import FinetuneRecipe
from mvd_scale.config.data import DataConfig
from mvd_scale.config.deepspeed import student_deepspeed
from mvd_scale.data.index import open_source
from mvd_scale.data.loader import ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling import steps_per_epoch
from mvd_scale.errors import UserError
from mvd_scale.evaluation.labels import check_labels, class_count
from mvd_scale.models import Classifier
from mvd_scale.training.classification import Classification
from mvd_scale.training.engine import Ranks, first_decides, full_parameters, join_ranks, leave_ranks, train_engine
from mvd_scale.training.loop import describe, finish, fit
from mvd_scale.training.momentum import MovingAverage
from mvd_scale.training.observers import Observer, Observers
from mvd_scale.training.optim import layer_scale, parameter_groups
from mvd_scale.training.run_folder import RunFolder, write_whole
from mvd_scale.training.schedule import Schedule
from mvd_scale.training.snapshots import Snapshots
from mvd_scale.training.validation import Validation

logger = logging.getLogger("mvd_scale")


def finetune(recipe: FinetuneRecipe) -> None:
    """Run a recipe from its start, or from its newest checkpoint, to its end.

    Raises:
        UserError: something that the user can mend; nothing was overwritten.
        Stopped: the run was asked to stop; it was saved.
    """
    weights = recipe.training.initial_encoder
    if weights is None and not recipe.classifier.from_scratch:
        raise UserError(
            "training.initial_encoder is missing: name the pre-trained weights with "
            "`--training.initial_encoder PATH`, or train without any by `--classifier.from_scratch true`"
        )
    folder = RunFolder(recipe.run.folder)
    ranks = join_ranks(recipe.device, recipe.training.collective_timeout_minutes)
    student_deepspeed(recipe, ranks.world_size)
    first_decides(ranks, "prepared", lambda: prepare(recipe, folder))
    manifest = Manifest.load(folder.manifest)
    classes = class_count(manifest, recipe.classifier.classes)
    steps = steps_per_epoch(manifest, recipe.data, recipe.training.global_batch)
    schedule = Schedule(recipe.training, steps, recipe.lr_batch)
    if first_decides(ranks, "finished", lambda: folder.finished_at(schedule.last_step)):
        logger.info("%s is finished already: see %s", folder.path, folder.summary)
        return leave_ranks()

    torch.manual_seed(recipe.seed)
    head = recipe.classifier
    model = Classifier(recipe.model, classes, dropout=head.dropout, init_scale=head.init_scale)
    if weights is not None:
        start_encoder(model.encoder, weights)
    write = partial(save_weights, model=recipe.model, classes=manifest.classes, views=recipe.test)
    averaged = copy.deepcopy(model).to(ranks.device) if recipe.training.ema_decay else None
    depth, decay = len(model.encoder.blocks), recipe.training.layer_decay
    groups = parameter_groups(model, recipe.training.weight_decay, lambda name: layer_scale(name, depth, decay))
    engine = train_engine(model, groups, recipe, ranks)
    averages = [] if averaged is None else [_average(averaged, engine, recipe, write, ranks)]
    origin = {
        "videos": manifest.digest,
        "labels": hashlib.sha256(manifest.label[manifest.usable].tobytes()).hexdigest()[:16],
        "initial encoder": first_decides(ranks, "weights", lambda: None if weights is None else digest(weights)),
    }

    def export(engine: Any, where: Path) -> None:
        tensors = {name: full for name, full in full_parameters(engine) if ranks.first}
        if ranks.first:
            write(where / folder.classifier.name, tensors)

    snapshots = Snapshots(folder, recipe, ranks, origin, steps, averages, export)
    start = snapshots.resume(engine)
    if ranks.first:
        snapshots.clear_partial()
    describe(recipe, manifest, schedule, ranks)
    observers: list[Observer] = []
    if recipe.validation is not None:
        observers.append(Validation(recipe, folder, ranks, steps, averaged, export, write))
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
        sides=(),
        report=folder.quarantine,
    )
    with loader:
        objective = Classification(recipe, classes)
        fit(engine, objective, loader, schedule, snapshots, Observers(observers), recipe, folder, ranks, start)
    finish(engine, snapshots, folder, ranks, schedule.last_step)
    leave_ranks()


def prepare(recipe: FinetuneRecipe, folder: RunFolder) -> None:
    """Rank 0's part: see that the folder is free for this run, claim it, and index and check the videos.

    Raises:
        UserError: labels are missing or do not fit.
    """
    folder.check(recipe)
    folder.claim(recipe)
    write_whole(folder.environment, table(probe()) + "\n")
    manifest = open_source(recipe.data, folder.path)
    classes = class_count(manifest, recipe.classifier.classes)
    check_labels(manifest, classes, "data.source", every_class=True)
    manifest.save(folder.manifest)
    if recipe.validation is not None:
        cache = folder.path / "validation"
        cache.mkdir(exist_ok=True)
        source = DataConfig(source=recipe.validation.source, root=recipe.validation.root)
        tested = open_source(source, cache)
        check_labels(tested, classes, "validation.source", like=manifest)
        tested.save(cache / "manifest.parquet")


def _average(
    averaged: Classifier,
    engine: Any,
    recipe: FinetuneRecipe,
    write: Callable[[Path, dict[str, Tensor]], None],
    ranks: Ranks,
) -> MovingAverage:
    decay = recipe.training.ema_decay
    assert decay is not None
    averaged.eval().requires_grad_(False)
    return MovingAverage(
        dict(averaged.named_parameters()),
        dict(engine.module.named_parameters()),
        lambda step: decay,
        lambda folder: folder / "average.safetensors",
        write,
        ranks,
    )
