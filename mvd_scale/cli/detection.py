"""Command `mvd-scale detect`: action detection on key frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import WITH_OVERRIDES, device_option, overrides_argument
from mvd_scale.config.training import Precision

_file = click.Path(path_type=Path)
_annotations = click.option("--annotations", type=_file, required=True, help="Ground truth, such as ava_val_v2.2.csv.")
_actions = click.option(
    "--actions", type=_file, required=True,
    help="List of the actions that count, such as ava_action_list_v2.2_for_activitynet_2019.pbtxt.",
)  # fmt: skip
_excluded = click.option(
    "--excluded", type=_file, help="List of key frames to exclude, such as ava_val_excluded_timestamps_v2.2.csv."
)
_per_frame = click.option(
    "--per-frame",
    type=click.IntRange(min=1),
    help="Largest number of boxes per key frame that are scored; all if omitted, 50 in the AVA challenge.",
)


@click.group()
def detect() -> None:
    """Detect actions of people in key frames (AVA v2.2)."""


@detect.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@overrides_argument
def train(recipe: str, overrides: tuple[str, ...]) -> None:
    """Fine-tune a pre-trained encoder for action detection; resume if the run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe, such as --key_frames.annotations ava_train_v2.2.csv
    """
    from mvd_scale.config import load_detection_recipe
    from mvd_scale.detection.train import run_detection
    from mvd_scale.training.preemption import exit_on_preemption

    with exit_on_preemption():
        run_detection(load_detection_recipe(recipe, list(overrides)))


@detect.command()
@click.argument("checkpoint", type=_file)
@click.argument("source")
@_annotations
@click.option(
    "--boxes", type=_file, required=True,
    help="Boxes of people from a detector (.csv): video, second, x1, y1, x2, y2, an empty column, score.",
)  # fmt: skip
@_actions
@_excluded
@click.option("--out", type=_file, required=True, help="Folder for results and figures.")
@click.option(
    "--score", type=click.FloatRange(0, 1), default=0.8, show_default=True,
    help="Smallest score of a box of a person; boxes with a lower score are ignored.",
)  # fmt: skip
@click.option(
    "--starts-at", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Time of the annotations, in seconds, at which the video files start.",
)  # fmt: skip
@click.option(
    "--short-side", type=click.IntRange(min=1), default=256, show_default=True,
    help="Length in pixels to which the short side of a frame is resized.",
)  # fmt: skip
@_per_frame
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Key frames per batch.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of the model; fp16 on GPUs and fp32 on CPUs if omitted.",
)  # fmt: skip
@click.option("--root", help="Folder or URL to which the paths of a list are relative.")
@device_option
def evaluate(
    checkpoint: Path,
    source: str,
    out: Path,
    per_frame: int | None,
    batch: int,
    precision: Precision | None,
    root: str | None,
    device: str,
    **test: Any,
) -> None:
    """Compute the frame mAP of a CHECKPOINT on the videos of SOURCE. An interrupted command resumes when started again.

    CHECKPOINT is a file of weights or a run folder. Of a run the last weights are tested; those of the best validation
    are tested if RUN/best.safetensors is named. SOURCE is a manifest, or any other source that `data index` accepts.
    """
    from mvd_scale.config.data import DataConfig
    from mvd_scale.config.detection import DetectionTest
    from mvd_scale.detection.evaluate import run_detection_evaluation
    from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
    from mvd_scale.models.precision import usual_precision

    ranks = init_distributed(device, timeout_minutes=10)
    figures = run_detection_evaluation(
        checkpoint,
        DataConfig(source=source, root=root),
        DetectionTest.model_validate(test),
        out,
        ranks,
        batch=batch,
        precision=precision or usual_precision(ranks.device),
        per_frame=per_frame,
    )
    destroy_distributed()
    if ranks.is_main:
        click.echo(f"{figures.to_text()}\n{out}")


@detect.command()
@click.argument("results", type=_file)
@_annotations
@_actions
@_excluded
@click.option("--out", type=_file, help="Table to write, with one line per action (.csv).")
@_per_frame
def score(
    results: Path, annotations: Path, actions: Path, excluded: Path | None, out: Path | None, per_frame: int | None
) -> None:
    """Compute the frame mAP of RESULTS, a file of detections in AVA's official format, from any model."""
    from mvd_scale.detection.evaluate import score_results

    judged = score_results(results, annotations, actions, excluded, per_frame)
    if out is not None:
        judged.write(out)
    click.echo(f"frame mAP  {100 * judged.mean:.2f} % over {judged.tested} actions, IoU 0.5")


@detect.command()
@click.option("--out", type=_file, required=True, help="Folder for train/, test/ and their annotations.")
@click.option("--train", type=click.IntRange(min=1), default=40, show_default=True, help="Training videos.")
@click.option("--test", type=click.IntRange(min=1), default=10, show_default=True, help="Test videos.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all random choices.")
def synth(out: Path, train: int, test: int, seed: int) -> None:
    """Make videos of moving textures with annotations in AVA's format: texture and direction are the actions."""
    from mvd_scale.detection.synth import make_detection_set

    click.echo(make_detection_set(out, train=train, test=test, seed=seed))
