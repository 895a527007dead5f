"""Execution of a training run from its start or its newest checkpoint to its end, for any `TrainingJob`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from mvd_kernels import attention_backends
from mvd_scale.config import Recipe, RunRecipe
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
from mvd_scale.training.checkpointing.checkpointer import Checkpointer, SavedModel
from mvd_scale.training.checkpointing.folders import saved_steps
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.metrics.writer import check_sinks
from mvd_scale.training.run_events import record_start, recording_end
from mvd_scale.training.teachers.prefetch import BatchStarter, TeacherPrefetcher
from mvd_scale.training.trained_model import TrainedModel
from mvd_scale.training.trainer import Trainer
from mvd_scale.utils.events import EventLog
from mvd_scale.utils.io import read_metrics, truncate_metrics

logger = logging.getLogger("mvd_scale")

AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)


class TrainingJob(ABC, Generic[AnyRecipe]):
    """Model and data of a run. `run_training` calls the methods in the order of their definition.

    A run of several students is a job with the data, and for each student the job of its run alone, in `students`: it
    describes and exports the student, and owns its folder.

    Args:
        recipe: recipe of the run.
        folder: folder of the run.
        name: name of the student, for one of several.
    """

    rows: str = "videos"
    """Plural noun for the rows of the manifest in log lines."""

    def __init__(self, recipe: AnyRecipe, folder: RunFolder, name: str = "") -> None:
        self.recipe = recipe
        self.folder = folder
        self.name = name
        self.students: Sequence[TrainingJob[AnyRecipe]] = [self]

    @property
    def runs(self) -> Sequence[TrainingJob[AnyRecipe]]:
        """This job, and those of its students if they are others."""
        return [self, *(student for student in self.students if student is not self)]

    def prepare(self) -> None:
        """Check that this run may use its folders, claim them, and index the data. Only rank 0 calls it.

        Raises:
            UserError: a folder contains other files or another run, the data are invalid, or metrics cannot be
                written where the recipe says.
        """
        check_sinks(self.recipe)
        for run in self.runs:
            run.folder.check(run.recipe)
        for run in self.runs:
            run.folder.claim()
        manifest = self.index()
        for run in self.runs:
            run.folder.record(run.recipe, manifest)

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
    def origins(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Compute digests of the data and weights that each of `students` depends on, as JSON. All ranks call it.

        A checkpoint stores them; it can be resumed only with equal ones.
        """

    @abstractmethod
    def build(self, ranks: Ranks, steps_per_epoch: int) -> list[TrainedModel]:
        """Build the model of each of `students` and its engine. All ranks call it, with equally seeded generators."""

    def schedule(self, steps_per_epoch: int) -> Schedule:
        """Create the schedule of learning rate and weight decay."""
        return Schedule(self.recipe.training, steps_per_epoch, self.recipe.lr_batch)

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
    def callbacks(self, ranks: Ranks, steps_per_epoch: int) -> Sequence[Callback]:
        """Create the callbacks that run between optimizer steps."""


def run_training(job: TrainingJob[Any]) -> None:
    """Run a job from its start or its newest checkpoint to its end. All ranks call it.

    If another rank, its host or the link to it fails, the process ends with `FAULT_CODE`; see `Watchdog`.

    Raises:
        UserError: the recipe, the data or the environment is invalid; no result was overwritten.
        Preempted: the run received a stop signal and saved a checkpoint.
    """
    recipe, folder = job.recipe, job.folder
    with ExitStack() as ends:
        for run in job.runs:
            ends.enter_context(recording_end(run.folder))
        ranks = init_distributed(recipe.device, recipe.training.collective_timeout_minutes)
        for run in job.runs:
            check_deepspeed_config(run.recipe, ranks.world_size)
        minutes = recipe.training.hang_minutes
        with Watchdog(ranks, folder.faults, EventLog(folder.events), minutes, claimed=False) as watchdog:
            ranks.progress.enter("prepare", patience=0)
            run_on_rank0(ranks, "prepared", job.prepare)
            watchdog.claim()
            _train(job, ranks, watchdog)
        destroy_distributed()


def _train(job: TrainingJob[Any], ranks: Ranks, watchdog: Watchdog) -> None:
    """Build the model, train it from its start or its newest checkpoint, and write its results."""
    recipe, folder = job.recipe, job.folder
    ranks.progress.enter("build", patience=0)
    manifest = job.open(ranks)
    steps = steps_per_epoch(manifest, recipe.data, recipe.training.global_batch)
    schedule = job.schedule(steps)
    origins = job.origins(ranks)
    if run_on_rank0(ranks, "finished", lambda: is_finished(job, schedule.last_step, origins)):
        logger.info("%s is already finished: see %s", folder.path, folder.summary)
        return

    torch.manual_seed(recipe.seed)
    for run in job.runs:
        record_start(run.folder, run.recipe, schedule, ranks)
    models = job.build(ranks, steps)
    saved = [
        SavedModel(student.folder, student.recipe, model, origin, student.describe())
        for student, model, origin in zip(job.students, models, origins, strict=True)
    ]
    with Checkpointer(saved, recipe, ranks, steps) as checkpointer:
        ranks.progress.enter("resume", patience=0)
        start = resume(checkpointer, schedule, folder, ranks)
        log_run_summary(recipe, manifest, schedule, ranks, job.rows)
        callbacks = [student.callbacks(ranks, steps) for student in job.students]
        with job.load(ranks, range(start, schedule.last_step)) as loader:
            trainer = Trainer(models, TeacherPrefetcher(loader, job.prefetch(ranks)), recipe, ranks, start)
            with watchdog.explaining():
                trainer.train(folder, checkpointer, CallbackList(list(zip(models, callbacks, strict=True))))
    ranks.progress.enter("export", patience=0)
    finish(job, models, ranks, schedule.last_step, origins)


def is_finished(job: TrainingJob[Any], last_step: int, origins: Sequence[dict[str, Any]]) -> bool:
    """Whether a run, and that of each of its students, has finished after `last_step` steps. Only rank 0 calls it.

    Raises:
        UserError: see `RunFolder.is_finished`.
    """
    finished = [
        student.folder.is_finished(last_step, origin) for student, origin in zip(job.students, origins, strict=True)
    ]
    return all(finished) and job.folder.is_finished(last_step, {})


def resume(checkpointer: Checkpointer, schedule: Schedule, folder: RunFolder, ranks: Ranks) -> int:
    """Load the newest checkpoint, and delete metrics and partial files that a killed run wrote after it.

    Returns:
        number of completed optimizer steps, 0 without a checkpoint.

    Raises:
        UserError: see `Checkpointer.resume`; or the checkpoint is beyond the last step of the run.
    """
    # Before a newer checkpoint of a student that went on alone is set aside.
    reached = max((step for path in checkpointer.paths for step in saved_steps(path)), default=0)
    if reached > schedule.last_step:
        raise UserError(
            f"{folder.path} has already reached step {reached}, beyond its last step {schedule.last_step}; "
            "raise training.max_steps, or start a new run in another `--run.folder`"
        )
    start = checkpointer.resume()
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
    for name, alone in recipe.each_student().items() if isinstance(recipe, Recipe) else [("", recipe)]:
        if ranks.device.type == "cpu" and alone.training.precision == "bf16":
            # The placement has chosen its way, and logged it.
            continue
        logger.info("attention of %s: %s", f"students.{name}" if name else "the student", _attention(alone, ranks))
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


def finish(
    job: TrainingJob[Any],
    models: Sequence[TrainedModel],
    ranks: Ranks,
    last_step: int,
    origins: Sequence[dict[str, Any]],
) -> None:
    """Export the final weights, and write the summary of the run with its first and last metrics.

    Args:
        job: the finished job.
        models: model of each of its students.
        ranks: this process among all.
        last_step: number of optimizer steps.
        origins: result of `TrainingJob.origins`.
    """
    for student, model in zip(job.students, models, strict=True):
        student.export(model.engine, student.folder.path, ranks)
        for average in model.averages:
            average.save(student.folder.path)

    def write_summary() -> None:
        summaries = {student.folder: origin for student, origin in zip(job.students, origins, strict=True)}
        # The one of the whole run comes last: it says that all are there.
        for folder, origin in (summaries if job.folder in summaries else {**summaries, job.folder: {}}).items():
            readings = read_metrics(folder.metrics)
            folder.finish({"steps": last_step, "origin": origin, "first": readings[0], "last": readings[-1]})
        logger.info("finished: %s", job.folder.path)

    # The others stay until it is written: rank 0 would miss their heartbeats while it writes the weights.
    run_on_rank0(ranks, "summary", write_summary)
