"""Runner of `mvd-scale pipeline`: stages run in order; finished stages are skipped, and interrupted ones resume."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvd_scale.config import RunRecipe, finetune_recipe_from_dict, recipe_from_dict
from mvd_scale.config.pipeline import (
    CompareStage,
    DrawStage,
    EvaluateStage,
    FinetuneStage,
    IndexStage,
    Pipeline,
    PretrainStage,
    ProbeStage,
    SamplesStage,
    Stage,
    SynthStage,
    TrainStage,
    references,
)
from mvd_scale.distributed.free_port import free_port
from mvd_scale.distributed.hostfile import read_hostfile
from mvd_scale.distributed.remote_command import remote_words
from mvd_scale.errors import UserError
from mvd_scale.pipelines.stage_job import StageJob
from mvd_scale.utils.io import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("mvd_scale")

_MAX_WAIT_SECONDS = 120
"""Seconds that a start waits for the ranks of an earlier start, which save a checkpoint before they end."""


def run_pipeline(pipeline: Pipeline) -> None:
    """Run all stages of a pipeline that are not finished.

    Raises:
        UserError: the hostfile is malformed, a recipe is invalid or cannot be split over the ranks, before any stage
            starts; another process runs the pipeline; or a stage failed.
    """
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # All recipes are checked before the first stage starts, so that a fault shows at once, not after hours.
    recipes = {name: stage_recipe(pipeline, name) for name in pipeline.stages if _trains(pipeline, name)}
    if pipeline.hostfile is None:
        ranks = pipeline.ranks or _usual_ranks()
    else:
        ranks = sum(read_hostfile(str(pipeline.hostfile)).values())
    for recipe in recipes.values():
        recipe.micro_batch_and_accumulation(ranks)
    with exclusive_lock(pipeline.folder) as lock:
        for number, name in enumerate(pipeline.stages, start=1):
            stage, mark = pipeline.stages[name], pipeline.folder / f".{name}.done"
            label = f"stage {number}/{len(pipeline.stages)}, {name}"
            wanted = _fingerprint(pipeline, name)
            if stage_output(pipeline, name).exists() and mark.is_file() and mark.read_text() == wanted:
                logger.info("%s: is done already", label)
                continue
            logger.info("%s: %s", label, stage.title or stage.kind)
            if name in recipes:
                write_recipe(pipeline, name)
            if runs_on_ranks(stage):
                _launch(pipeline, name, ranks, lock)
            else:
                run_local_stage(pipeline, name)
            mark.write_text(wanted)
    _print_summary(pipeline, list(recipes), ranks, time.monotonic() - started)


def _trains(pipeline: Pipeline, name: str) -> bool:
    return isinstance(pipeline.stages[name], TrainStage)


def stage_recipe(pipeline: Pipeline, name: str) -> RunRecipe:
    """Recipe of a training stage, whose run folder is the folder of the stage.

    Raises:
        UserError: the recipe is invalid.
    """
    values = pipeline.resolved(name)["recipe"] | {"run": {"folder": str(pipeline.place(name))}}
    read = finetune_recipe_from_dict if isinstance(pipeline.stages[name], FinetuneStage) else recipe_from_dict
    return read(values, f"stages.{name}.recipe")


def _fingerprint(pipeline: Pipeline, name: str) -> str:
    """Hash of the fields of a stage and, recursively, of the stages to which it refers.

    A stage runs again if it changed, or if a stage on whose output it depends changed.
    """
    below = {other: _fingerprint(pipeline, other) for other in references(pipeline.stages[name])}
    described = {"stage": pipeline.resolved(name), "below": below}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def stage_output(pipeline: Pipeline, name: str) -> Path:
    """Path that exists when a stage is finished."""
    stage, place = pipeline.stages[name], pipeline.place(name)
    if isinstance(stage, DrawStage):
        return Path(pipeline.resolved(name)["run"]) / "predictions.png"
    made = {
        SamplesStage: ".",
        SynthStage: ".",
        IndexStage: "manifest.parquet",
        # Weights of several students are in their own folders.
        PretrainStage: "summary.json" if any(place.glob("students/*")) else "encoder.safetensors",
        FinetuneStage: "classifier.safetensors",
        EvaluateStage: "summary.json",
        ProbeStage: "linear/summary.json",
        CompareStage: "comparison.json",
    }
    return place / made[type(stage)]


def run_local_stage(pipeline: Pipeline, name: str) -> None:
    """Run a stage that needs only one process, in this process."""
    place = pipeline.place(name)
    stage = type(pipeline.stages[name]).model_validate(pipeline.resolved(name))
    if isinstance(stage, SamplesStage):
        from mvd_scale.data.generated.sample_clips import write_sample_clips

        write_sample_clips(place)
    elif isinstance(stage, SynthStage):
        from mvd_scale.data.generated.synthetic import write_synthetic_videos

        counts = {"train": stage.train, "validation": stage.validation, "test": stage.test}
        write_synthetic_videos(stage.label, place, **counts, seed=stage.seed)
    elif isinstance(stage, IndexStage):
        _index(stage, place)
    elif isinstance(stage, CompareStage):
        from mvd_scale.evaluation.comparison import compare_tests

        compare_tests(Path(stage.first), Path(stage.second)).write(place)
    else:
        assert isinstance(stage, DrawStage)
        from mvd_scale.visualization.predictions import draw_predictions

        logger.info("%s", draw_predictions(Path(stage.run), clips=stage.clips))


def _index(stage: IndexStage, place: Path) -> None:
    from mvd_scale.data.indexing.build import build_manifest
    from mvd_scale.data.indexing.listing import ListOptions

    place.mkdir(exist_ok=True)
    journal = place / ".journal"
    options = ListOptions(stage.root, stage.classes, stage.split, stage.fold)
    workers = len(os.sched_getaffinity(0))
    build_manifest(stage.sources, workers=workers, options=options, journal=journal).save(place / "manifest.parquet")
    journal.unlink()


def runs_on_ranks(stage: Stage) -> bool:
    """Whether a stage is a command that runs on all ranks, not work of the pipeline's own process."""
    return isinstance(stage, TrainStage | EvaluateStage | ProbeStage)


def stage_device(pipeline: Pipeline, name: str) -> str:
    """Device of a stage that runs on ranks: auto, cuda or cpu."""
    stage = pipeline.stages[name]
    if isinstance(stage, TrainStage):
        return stage_recipe(pipeline, name).device
    assert isinstance(stage, EvaluateStage | ProbeStage)
    return stage.device


def stage_arguments(pipeline: Pipeline, name: str) -> list[str]:
    """Arguments of `mvd-scale` by which a stage runs on ranks, see `recipe_file` for its recipe."""
    stage = type(pipeline.stages[name]).model_validate(pipeline.resolved(name))
    if isinstance(stage, TrainStage):
        return [pipeline.stages[name].kind, "--recipe", str(recipe_file(pipeline, name))]
    options: dict[str, Any]
    if isinstance(stage, ProbeStage):
        words = ["probe", "linear", str(stage.checkpoint), "--train", stage.train, "--test", stage.test]
        options = {"stride": stage.stride, "decay": stage.decay}
    else:
        assert isinstance(stage, EvaluateStage)
        words = ["evaluate", str(stage.checkpoint), stage.source]
        options = {} if stage.views is None else stage.views.model_dump(exclude_unset=True)
        options |= {"root": stage.root}
    words += ["--out", str(pipeline.place(name))]
    for option, value in (options | {"batch": stage.batch, "device": stage.device}).items():
        if value is not None:
            words += [f"--{option}", str(value)]
    return words


def recipe_file(pipeline: Pipeline, name: str) -> Path:
    """File of the resolved recipe of a training stage, beside its folder."""
    return pipeline.folder / f"{name}.yaml"


def write_recipe(pipeline: Pipeline, name: str) -> None:
    """Write the resolved recipe of a training stage."""
    write_atomic(recipe_file(pipeline, name), stage_recipe(pipeline, name).to_yaml())


def _launch(pipeline: Pipeline, name: str, ranks: int, lock: int) -> None:
    """Run a stage under the `deepspeed` launcher."""
    arguments, device = stage_arguments(pipeline, name), stage_device(pipeline, name)
    words = ["mvd_scale", *arguments]
    if pipeline.hostfile is None:
        # What the `deepspeed` command runs on a single host, without the 3 seconds that the command takes.
        hosts = base64.urlsafe_b64encode(json.dumps({"localhost": device_ids(ranks)}).encode()).decode()
        launcher = ["deepspeed.launcher.launch", f"--world_info={hosts}", "--master_addr", "127.0.0.1"]
    else:
        launcher = ["deepspeed.launcher.runner", "--hostfile", str(pipeline.hostfile)]
        words = remote_words("mvd_scale", arguments)
    command = [sys.executable, "-m", *launcher, "--master_port", str(free_port())]
    command += ["--no_local_rank", "--quiet", "--module", *words]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"} if device == "cpu" or not _gpus() else dict(os.environ)
    job = StageJob(command, env=env, lock=lock)
    try:
        code = job.wait()
    finally:
        job.end()
    if code:
        raise UserError(
            f"stage {name}, `mvd-scale {shlex.join(arguments)}`, ended with exit code {code}; its own message is "
            "above. Start the same command again to resume"
        )


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[int]:
    """Lock the folder of a pipeline against other starts; yields the file descriptor of the lock.

    Raises:
        UserError: the folder cannot be written, or another process holds the lock for more than two minutes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written: {error.strerror}") from error
    with file:
        for second in range(_MAX_WAIT_SECONDS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if second == 0:
                    logger.info("another start of this pipeline still runs in %s: waiting until it ends", folder)
                time.sleep(1)
            except OSError as error:
                # A network file system without locks. The runs in it have leases of their own.
                logger.warning("%s has no locks (%s): start no other process of this pipeline", folder, error.strerror)
                break
        else:
            raise UserError(f"another process runs a pipeline in {folder}: end it, or choose another folder")
        yield file.fileno()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def device_ids(ranks: int) -> list[str]:
    """Devices of the ranks of a single host: of those that CUDA_VISIBLE_DEVICES names, if it is set."""
    visible = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
    return visible[:ranks] if len(visible) >= ranks else [str(number) for number in range(ranks)]


def _usual_ranks() -> int:
    return _gpus() or 2


def _print_summary(pipeline: Pipeline, trained: list[str], ranks: int, seconds: float) -> None:
    """Print a table of the training stages, and the results of the others."""
    from rich.console import Console
    from rich.table import Table

    where = f"{ranks} ranks" if pipeline.hostfile is None else f"hosts of {pipeline.hostfile}"
    table = Table(title=f"{pipeline.folder}: {where}, {seconds / 60:.1f} minutes")
    for column in ("stage", "steps", "loss at start", "at end", "clips/s", "weights"):
        table.add_column(column, overflow="fold")
    for name in trained:
        place = pipeline.place(name)
        weights = "classifier" if isinstance(pipeline.stages[name], FinetuneStage) else "encoder"
        for run in sorted(place.glob("students/*")) or [place]:
            summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
            losses = [f"{reading['loss']:.4f}" for reading in (summary["first"], summary["last"])]
            speed = f"{summary['last']['clips_per_second']:.1f}"
            label = name if run == place else f"{name}: {run.name}"
            table.add_row(label, str(summary["steps"]), *losses, speed, str(run / f"{weights}.safetensors"))
    console = Console()
    if trained:
        console.print(table)
        console.print(f"Curves: tensorboard --logdir {shlex.quote(str(pipeline.folder))}")
    for name in pipeline.stages:
        if isinstance(pipeline.stages[name], DrawStage):
            console.print(f"Picture: {stage_output(pipeline, name)}")
        elif isinstance(pipeline.stages[name], EvaluateStage):
            figures = json.loads(stage_output(pipeline, name).read_text())
            console.print(f"{name}: top-1 {100 * figures['top1']:.1f} % of {figures['videos']} videos")
        elif isinstance(pipeline.stages[name], ProbeStage):
            figures = json.loads(stage_output(pipeline, name).read_text())
            console.print(f"{name}: linear probe, top-1 {100 * figures['top1']:.1f} % of {figures['videos']} videos")
        elif isinstance(pipeline.stages[name], CompareStage):
            console.print(_comparison(pipeline, name))


def _comparison(pipeline: Pipeline, name: str) -> Table:
    """The accuracies of two tests, their difference, and the conditions."""
    from rich.table import Table

    from mvd_scale.evaluation.comparison import Comparison

    stage = CompareStage.model_validate(pipeline.resolved(name))
    comparison = Comparison.load(pipeline.place(name))
    table = Table(title=f"{name}: {comparison.videos} test videos", caption=stage.caption)
    table.add_column("classifier")
    table.add_column("videos named right, %")
    for row, estimate in zip(stage.names, (comparison.first, comparison.second), strict=True):
        table.add_row(row, estimate.to_text())
    table.add_row("difference", comparison.difference.to_text(signed=True))
    return table
