"""Stage 3: a pre-trained encoder is taught a task (Sec. 4.2). What differs from task to task is one class each."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mvd_scale.checkpoints.reading import read_source, tensors_digest
from mvd_scale.checkpoints.weights import start_encoder
from mvd_scale.config import TaskRecipe
from mvd_scale.config.deepspeed import student_deepspeed
from mvd_scale.data.loader import ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling import steps_per_epoch
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier
from mvd_scale.models.detector import Detector
from mvd_scale.training.ahead import Ahead
from mvd_scale.training.device import placement_of
from mvd_scale.training.engine import full_parameters, train_engine
from mvd_scale.training.loop import Objective, describe, finish, fit, resume
from mvd_scale.training.momentum import MovingAverage
from mvd_scale.training.observers import Observer, Observers
from mvd_scale.training.optim import layer_scale, parameter_groups
from mvd_scale.training.ranks import Ranks, first_decides, join_ranks, leave_ranks
from mvd_scale.training.run_folder import RunFolder
from mvd_scale.training.schedule import Schedule
from mvd_scale.training.snapshots import Snapshots
from mvd_scale.training.validation import Validation

logger = logging.getLogger("mvd_scale")

AnyRecipe = TypeVar("AnyRecipe", bound=TaskRecipe)


class Task(ABC, Generic[AnyRecipe]):
    """What an encoder is taught, and from what."""

    rows: str = "videos"
    """What a row of its manifest is."""

    figure: str
    """What a validation measures; more is better."""

    weights: str
    """File of a run in which the trained model is kept."""

    def __init__(self, recipe: AnyRecipe, folder: RunFolder) -> None:
        self.recipe = recipe
        self.folder = folder

    @abstractmethod
    def prepare(self) -> Manifest:
        """Rank 0's part: index and check all data; the videos of the training.

        Raises:
            UserError: they do not fit.
        """

    @abstractmethod
    def open(self) -> Manifest:
        """Read what was prepared, on every rank; a row for each clip of an epoch."""

    @abstractmethod
    def build(self) -> Classifier | Detector:
        """The model, whose `encoder` is pre-trained."""

    @abstractmethod
    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write the weights of the model into a file."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """What a checkpoint belongs to: digests of the data."""

    @abstractmethod
    def objective(self) -> Objective:
        """What the training minimises."""

    @abstractmethod
    def loader(self, **places: Any) -> ClipLoader:
        """Its clips; `places` is what the loader must know of ranks and steps."""

    @abstractmethod
    def measure(self, ranks: Ranks) -> Callable[[Any], float]:
        """Of the model in training, or its average, on the validation set. All ranks call what is returned."""


def teach(task: Task[Any]) -> None:
    """Run a task from its start, or from its newest checkpoint, to its end.

    Raises:
        UserError: something that the user can mend; nothing was overwritten.
        Stopped: the run was asked to stop; it was saved.
    """
    recipe, folder = task.recipe, task.folder
    weights, head = recipe.training.initial_encoder, recipe.head_section
    if weights is None and not recipe.head.from_scratch:
        raise UserError(
            "training.initial_encoder is missing: name the pre-trained weights with "
            f"`--training.initial_encoder PATH`, or train without any by `--{head}.from_scratch true`"
        )
    ranks = join_ranks(recipe.device, recipe.training.collective_timeout_minutes)
    student_deepspeed(recipe, ranks.world_size)
    first_decides(ranks, "prepared", lambda: _prepare(task))
    manifest = task.open()
    _agree(task.origin(), ranks)
    origin = task.origin() | {
        "initial encoder": first_decides(
            ranks, "weights", lambda: None if weights is None else tensors_digest(read_source(weights).tensors)
        )
    }
    steps = steps_per_epoch(manifest, recipe.data, recipe.training.global_batch)
    schedule = Schedule(recipe.training, steps, recipe.lr_batch)
    if first_decides(ranks, "finished", lambda: folder.finished_at(schedule.last_step, origin)):
        logger.info("%s is finished already: see %s", folder.path, folder.summary)
        return leave_ranks()

    torch.manual_seed(recipe.seed)
    model = task.build()
    if weights is not None:
        start_encoder(model.encoder, weights)
    averaged = copy.deepcopy(model).to(ranks.device) if recipe.training.ema_decay else None
    depth, decay = len(model.encoder.blocks), recipe.training.layer_decay
    groups = parameter_groups(model, recipe.training.weight_decay, lambda name: layer_scale(name, depth, decay))
    placement = placement_of(recipe, {}, ranks)
    engine = train_engine(model, groups, recipe, placement, ranks)
    averages = [] if averaged is None else [_average(averaged, engine, task, ranks)]

    def export(engine: Any, where: Path) -> None:
        tensors = {name: full for name, full in full_parameters(engine) if ranks.first}
        if ranks.first:
            task.write(where / task.weights, tensors)

    snapshots = Snapshots(folder, recipe, ranks, origin, steps, averages, export)
    start = resume(engine, snapshots, schedule, folder, ranks)
    describe(recipe, manifest, schedule, ranks, task.rows)
    observers: list[Observer] = []
    if recipe.validation is not None:
        every, measure = recipe.validation.every_epochs, task.measure(ranks)
        keep = partial(_keep, export=export, averaged=averaged, task=task, ranks=ranks)
        observers.append(Validation(every, steps, task.figure, measure, folder, ranks, averaged, keep))
    loader = task.loader(
        global_batch=recipe.training.global_batch,
        micro_batch=placement.micro_batch.value,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        cpus=ranks.cpus,
        start_step=start,
        total_steps=schedule.last_step,
        report=folder.quarantine,
    )
    with loader:
        fit(
            engine, task.objective(), Ahead(loader), schedule, snapshots, Observers(observers), recipe, folder, ranks,
            start,
        )  # fmt: skip
    finish(engine, snapshots, folder, ranks, schedule.last_step)
    leave_ranks()


def _agree(origin: dict[str, Any], ranks: Ranks) -> None:
    told: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(told, origin)
    differing = [rank for rank, there in enumerate(told) if there != told[0]]
    if differing:
        raise UserError(f"rank {differing[0]} sees other data than rank 0: give all hosts the same files")


def _prepare(task: Task[Any]) -> None:
    """Rank 0's part: see that the folder is free for this run, claim it, and prepare the data."""
    task.folder.check(task.recipe)
    task.folder.claim()
    task.folder.record(task.recipe, task.prepare())


def _keep(
    engine: Any,
    where: Path,
    *,
    export: Callable[[Any, Path], None],
    averaged: nn.Module | None,
    task: Task[Any],
    ranks: Ranks,
) -> Path:
    """Write the weights that were judged, and say where. All ranks call it."""
    if averaged is None:
        export(engine, where)
    elif ranks.first:
        task.write(where / task.weights, averaged.state_dict())
    return where / task.weights


def _average(averaged: nn.Module, engine: Any, task: Task[Any], ranks: Ranks) -> MovingAverage:
    decay = task.recipe.training.ema_decay
    assert decay is not None
    averaged.eval().requires_grad_(False)
    return MovingAverage(
        dict(averaged.named_parameters()),
        dict(engine.module.named_parameters()),
        lambda step: decay,
        lambda folder: folder / "average.safetensors",
        task.write,
        ranks,
    )
