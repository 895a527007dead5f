"""Execution of a training run from its start or its newest checkpoint to its end, for any `TrainingJob`."""

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
from mvd_scale.distributed.health.watchdog import Watchdog
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.models.precision import dtype_of
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.callbacks import Callback, CallbackList
from mvd_scale.training.checkpointing.checkpointer import Checkpointer, RunState
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.metrics.writer import check_sinks
from mvd_scale.training.run_events import record_start, recording_end
from mvd_scale.training.teachers.prefetch import BatchStarter, TeacherPrefetcher
from mvd_scale.training.trainer import TrainedModel, Trainer
from mvd_scale.utils.events import EventLog
from mvd_scale.utils.io import read_metrics, truncate_metrics

logger = logging.getLogger("mvd_scale")

AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)


class TrainingJob(ABC, Generic[AnyRecipe]):
    """Model and data of a run. `run_training` calls the methods in the order of their definition.

    Args:
        recipe: recipe of the run.
        folder: folder of the run.
    """

    rows: str = "videos"
    """Plural noun for the rows of the manifest in log lines."""

    def __init__(self, recipe: AnyRecipe, folder: RunFolder) -> None:
        self.recipe = recipe
        self.folder = folder

    def prepare(self) -> None:
        """Check that this run may use the folder, claim it, and index the data. Only rank 0 calls it.

        Raises:
            UserError: the folder contains other files or another run, the data are invalid, or metrics cannot be
                written where the recipe says.
        """
        check_sinks(self.recipe)
        self.folder.check(self.recipe)
        self.folder.claim()
        self.folder.record(self.recipe, self.index())

    @abstractmethod
    def index(self) -> Manifest:
        """Index and check all data, and return the manifest of the training videos. Only rank 0 calls it.

        Raises:
            UserError: the data are invalid, or do not fit the recipe.
        """

    @abstractmethod
    def open(self, ranks: Ranks) -> Manifest:
        """Read the data that `prepare` indexed; the manifest has a row per `rows` item. All ranks call it."""

    @abstractmethod
    def origin(self, ranks: Ranks) -> dict[str, Any]:
        """Compute digests of the data and weights that the run depends on, serialisable as JSON. All ranks call it.

        A checkpoint stores them; it can be resumed only with equal ones.
        """

    @abstractmethod
    def build(self, ranks: Ranks, schedule: Schedule) -> TrainedModel:
        """Build the model and its DeepSpeed engine. All ranks call it, with equally seeded random generators."""

    @abstractmethod
    def export(self, engine: Any, folder: Path, ranks: Ranks) -> None:
        """Write the model's weights in float32 to a folder. All ranks call it."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Describe the model, as the metadata of the files of its weights."""

    @abstractmethod
    def load(self, ranks: Ranks, steps: range) -> ClipLoader:
        """Create the loader of this rank's clips for the optimizer steps `steps`."""

    def prefetch(self, ranks: Ranks) -> BatchStarter | None:
        """Create the function that starts work on a batch in advance; None loads each batch when it is needed."""
        return None

    @abstractmethod
    def callbacks(self, ranks: Ranks, schedule: Schedule) -> Sequence[Callback]:
        """Create the callbacks that run between optimizer steps."""


def run_training(job: TrainingJob[Any]) -> None:
    """Run a job from its start or its newest checkpoint to its end. All ranks call it.

    If another rank, its host or the link to it fails, the process ends with `FAULT_CODE`; see `Watchdog`.

    Raises:
        UserError: the recipe, the data or the environment is invalid; no result was overwritten.
        Preempted: the run received a stop signal and saved a checkpoint.
    """
    recipe, folder = job.recipe, job.folder
    with recording_end(folder):
        ranks = init_distributed(recipe.device, recipe.training.collective_timeout_minutes)
        check_deepspeed_config(recipe, ranks.world_size)
        run_on_rank0(ranks, "prepared", job.prepare)
        with Watchdog(ranks, folder.faults, EventLog(folder.events), recipe.training.hang_minutes) as watchdog:
            _train(job, ranks, watchdog)
        destroy_distributed()


def _train(job: TrainingJob[Any], ranks: Ranks, watchdog: Watchdog) -> None:
    """Build the model, train it from its start or its newest checkpoint, and write its results."""
    recipe, folder = job.recipe, job.folder
    ranks.progress.enter("build", patience=0)
    manifest = job.open(ranks)
    steps = steps_per_epoch(manifest, recipe.data, recipe.training.global_batch)
    schedule = Schedule(recipe.training, steps, recipe.lr_batch)
    origin = job.origin(ranks)
    if run_on_rank0(ranks, "finished", lambda: folder.is_finished(schedule.last_step, origin)):
        logger.info("%s is already finished: see %s", folder.path, folder.summary)
        return

    torch.manual_seed(recipe.seed)
    record_start(folder, recipe, schedule, ranks)
    model = job.build(ranks, schedule)
    run = RunState(origin, job.describe())
    with Checkpointer(folder, recipe, ranks, run, steps, model.engine, model.averages) as checkpointer:
        ranks.progress.enter("resume", patience=0)
        start = resume(checkpointer, schedule, folder, ranks)
        log_run_summary(recipe, manifest, schedule, ranks, job.rows)
        callbacks = CallbackList(job.callbacks(ranks, schedule))
        with job.load(ranks, range(start, schedule.last_step)) as loader:
            batches = TeacherPrefetcher(loader, job.prefetch(ranks))
            trainer = Trainer(model, batches, schedule, recipe, ranks, start)
            with watchdog.explaining():
                trainer.train(folder, checkpointer, callbacks)
    ranks.progress.enter("export", patience=0)
    finish(job, model, ranks, {"steps": schedule.last_step, "origin": origin})


def resume(checkpointer: Checkpointer, schedule: Schedule, folder: RunFolder, ranks: Ranks) -> int:
    """Load the newest checkpoint, and delete metrics and partial files that a killed run wrote after it.

    Returns:
        number of completed optimizer steps, 0 without a checkpoint.

    Raises:
        UserError: see `Checkpointer.resume`; or the checkpoint is beyond the last step of the run.
    """
    start = checkpointer.resume()
    if start > schedule.last_step:
        raise UserError(
            f"{folder.path} has already reached step {start}, beyond its last step {schedule.last_step}; "
            "raise training.max_steps, or start a new run in another `--run.folder`"
        )
    if ranks.is_main:
        checkpointer.clear_partial()
        truncate_metrics(folder.validation, start)
    return start


def log_run_summary(
    recipe: RunRecipe, manifest: Manifest, schedule: Schedule, ranks: Ranks, rows: str = "videos"
) -> None:
    """Log ranks, batch sizes, attention implementation and number of steps of the run.

    Args:
        recipe: recipe of the run.
        manifest: training data.
        schedule: schedule of the run.
        ranks: this process among all.
        rows: plural noun for the rows of the manifest.
    """
    micro, accumulation = recipe.micro_batch_and_accumulation(ranks.world_size)
    clips = recipe.data.copies * sum(part.clips for part in mixture_components(manifest, recipe.data))
    remainder = clips - schedule.steps_per_epoch * recipe.training.global_batch
    logger.info(
        "%s: %d ranks on %s, %s, %s; global batch %d = %d ranks x %d clips x %d accumulation steps",
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
    length = recipe.model.frames * recipe.data.stride
    short = sum(int((manifest.frames[rows] < length).sum()) for rows in manifest.usable_blocks())
    if short and not recipe.data.spans_whole_videos:
        logger.info("%d %s are in videos shorter than a clip, whose frames are repeated", short, rows)
    logger.info(
        "%d %s, %d excluded; %d steps per epoch, which leave %d clips unused; %d steps in total",
        len(manifest.usable),
        rows,
        len(manifest) - len(manifest.usable),
        schedule.steps_per_epoch,
        remainder,
        schedule.last_step,
    )


def _attention(recipe: RunRecipe, ranks: Ranks) -> str:
    """List attention implementations in order of preference up to the selected one; skipped ones with their reason."""
    assert recipe.model.width is not None
    assert recipe.model.heads is not None
    channels = recipe.model.width // recipe.model.heads
    reasons = attention_backends(ranks.device, dtype_of(recipe.training.precision), channels)
    return ", ".join(f"{name} ({reason})" if reason else name for name, reason in reasons.items())


def finish(job: TrainingJob[Any], model: TrainedModel, ranks: Ranks, summary: dict[str, Any]) -> None:
    """Export the final weights, and write the summary of the run with its first and last metrics."""
    folder = job.folder
    job.export(model.engine, folder.path, ranks)
    for average in model.averages:
        average.save(folder.path)

    def write_summary() -> None:
        readings = read_metrics(folder.metrics)
        folder.finish({**summary, "first": readings[0], "last": readings[-1]})
        logger.info("finished: %s", folder.path)

    # The others stay until it is written: rank 0 would miss their heartbeats while it writes the weights.
    run_on_rank0(ranks, "summary", write_summary)
