"""A run from its start, or from its newest checkpoint, to its end. A job says what is trained."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from mvd_kernels import attention_backends
from mvd_scale.config import RunRecipe
from mvd_scale.config.deepspeed import check_deepspeed_config
from mvd_scale.data.loaders.clip_loader import ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.sampler import mixture_components, steps_per_epoch
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.models.precision import dtype_of
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.callbacks import Callback, CallbackList
from mvd_scale.training.checkpointer import Checkpointer
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.teachers.prefetch import BatchStarter, TeacherPrefetcher
from mvd_scale.training.trainer import TrainedModel, Trainer
from mvd_scale.utils.io import read_metrics, truncate_metrics

logger = logging.getLogger("mvd_scale")

AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)


class TrainingJob(ABC, Generic[AnyRecipe]):
    """The model of a run, and its data. `run_training` calls the methods in the order in which they stand here."""

    rows: str = "videos"
    """What a row of the manifest is, for the log."""

    def __init__(self, recipe: AnyRecipe, folder: RunFolder) -> None:
        self.recipe = recipe
        self.folder = folder

    def prepare(self) -> None:
        """Rank 0's part: see that the folder is free for this run, claim it, and prepare the data.

        Raises:
            UserError: the folder holds something else, or the data do not fit.
        """
        self.folder.check(self.recipe)
        self.folder.claim()
        self.folder.record(self.recipe, self.index())

    @abstractmethod
    def index(self) -> Manifest:
        """Index and check all data on rank 0; the videos of the training.

        Raises:
            UserError: they do not fit.
        """

    @abstractmethod
    def open(self, ranks: Ranks) -> Manifest:
        """Read what was prepared, on every rank; a row for each clip of an epoch."""

    @abstractmethod
    def origin(self, ranks: Ranks) -> dict[str, Any]:
        """Digests of the data and the weights that a checkpoint belongs to. All ranks call it."""

    @abstractmethod
    def build(self, ranks: Ranks, schedule: Schedule) -> TrainedModel:
        """The model under DeepSpeed. All ranks call it, with the same random numbers."""

    @abstractmethod
    def export(self, engine: Any, folder: Path, ranks: Ranks) -> None:
        """Write the weights of the model into a folder, float32. All ranks call it."""

    @abstractmethod
    def load(self, ranks: Ranks, steps: range) -> ClipLoader:
        """The clips of some optimizer steps."""

    def prefetch(self, ranks: Ranks) -> BatchStarter | None:
        """How a batch is begun while the one before it is in use; None fetches each when it is asked for."""
        return None

    @abstractmethod
    def callbacks(self, ranks: Ranks, schedule: Schedule) -> Sequence[Callback]:
        """Who looks at the model between two steps."""


def run_training(job: TrainingJob[Any]) -> None:
    """Run a job from its start, or from its newest checkpoint, to its end.

    Raises:
        UserError: something that the user can mend; nothing was overwritten.
        Stopped: the run was asked to stop; it was saved.
    """
    recipe, folder = job.recipe, job.folder
    ranks = init_distributed(recipe.device, recipe.training.collective_timeout_minutes)
    check_deepspeed_config(recipe, ranks.world_size)
    run_on_rank0(ranks, "prepared", job.prepare)
    manifest = job.open(ranks)
    steps = steps_per_epoch(manifest, recipe.data, recipe.training.global_batch)
    schedule = Schedule(recipe.training, steps, recipe.lr_batch)
    origin = job.origin(ranks)
    if run_on_rank0(ranks, "finished", lambda: folder.is_finished(schedule.last_step, origin)):
        logger.info("%s is finished already: see %s", folder.path, folder.summary)
        return destroy_distributed()

    torch.manual_seed(recipe.seed)
    model = job.build(ranks, schedule)
    checkpointer = Checkpointer(
        folder, recipe, ranks, origin, steps, model.averages, lambda engine, where: job.export(engine, where, ranks)
    )
    start = resume(model.engine, checkpointer, schedule, folder, ranks)
    log_run_summary(recipe, manifest, schedule, ranks, job.rows)
    callbacks = CallbackList(job.callbacks(ranks, schedule))
    with job.load(ranks, range(start, schedule.last_step)) as loader:
        batches = TeacherPrefetcher(loader, job.prefetch(ranks))
        Trainer(model, batches, schedule, recipe, ranks, start).train(folder, checkpointer, callbacks)
    finish(model.engine, checkpointer, folder, ranks, schedule.last_step)
    destroy_distributed()


def resume(engine: Any, checkpointer: Checkpointer, schedule: Schedule, folder: RunFolder, ranks: Ranks) -> int:
    """Go on from the newest checkpoint, and forget what a killed run did after it; the steps that are done.

    Raises:
        UserError: as `Checkpointer.resume`, or there are more than the run shall have.
    """
    start = checkpointer.resume(engine)
    if start > schedule.last_step:
        raise UserError(
            f"{folder.path} has come to step {start} already, beyond its last step {schedule.last_step}; "
            "raise training.max_steps, or begin a new run in another `--run.folder`"
        )
    if ranks.is_main:
        checkpointer.clear_partial()
        truncate_metrics(folder.validation, start)
    return start


def log_run_summary(
    recipe: RunRecipe, manifest: Manifest, schedule: Schedule, ranks: Ranks, rows: str = "videos"
) -> None:
    """Log the size of the run; `rows` says what a row of the manifest is."""
    micro, accumulation = recipe.micro_batch_and_accumulation(ranks.world_size)
    clips = recipe.data.copies * sum(part.clips for part in mixture_components(manifest, recipe.data))
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


def finish(engine: Any, checkpointer: Checkpointer, folder: RunFolder, ranks: Ranks, step: int) -> None:
    """Export the weights and leave the figures of the run."""
    checkpointer.export(engine, folder.path)
    if ranks.is_main:
        readings = read_metrics(folder.metrics)
        folder.finish({"steps": step, "origin": checkpointer.origin, "first": readings[0], "last": readings[-1]})
        logger.info("finished: %s", folder.path)
