"""`mvd-scale detect`: one thin function per subcommand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import WITH_OVERRIDES, overrides_argument
from mvd_scale.config.training import Precision

_file = click.Path(path_type=Path)
_annotations = click.option("--annotations", type=_file, required=True, help="Ground truth: ava_val_v2.2.csv.")
_actions = click.option(
    "--actions", type=_file, required=True, help="Those that count: ava_action_list_v2.2_for_activitynet_2019.pbtxt."
)
_excluded = click.option("--excluded", type=_file, help="Key frames that do not: ava_val_excluded_timestamps_v2.2.csv.")
_per_frame = click.option(
    "--per-frame",
    type=click.IntRange(min=1),
    help="Boxes of a key frame that count; all if left out, 50 in the challenge.",
)


@click.group()
def detect() -> None:
    """Detect actions of people on key frames (AVA v2.2)."""


@detect.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@overrides_argument
def train(recipe: str, overrides: tuple[str, ...]) -> None:
    """Teach a pre-trained encoder to detect actions; resume when its run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe: --key_frames.annotations ava_train_v2.2.csv
    """
    from mvd_scale.config import load_detection
    from mvd_scale.detection.train import train_detector
    from mvd_scale.training.resilience import exit_when_stopped

    with exit_when_stopped():
        train_detector(load_detection(recipe, list(overrides)))


@detect.command()
@click.argument("checkpoint", type=_file)
@click.argument("source")
@_annotations
@click.option("--boxes", type=_file, required=True, help="People found: video, second, x1, y1, x2, y2, nothing, score.")
@_actions
@_excluded
@click.option("--out", type=_file, required=True, help="Folder for results and figures.")
@click.option(
    "--score", type=click.FloatRange(0, 1), default=0.8, show_default=True, help="Of people; less are left out."
)
@click.option("--starts-at", type=click.FloatRange(min=0), default=0.0, help="Second at which the files start; 0.")
@click.option("--short-side", type=click.IntRange(min=1), default=256, show_default=True, help="Pixels of a frame.")
@_per_frame
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Key frames decoded together.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp16 on GPUs, fp32 on CPUs.")
@click.option("--root", help="Folder or URL that the paths of a list start from.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
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
    """Frame mAP of a CHECKPOINT on the videos of SOURCE; started again after a kill, it goes on."""
    from mvd_scale.config.data import DataConfig
    from mvd_scale.config.detection import DetectionTest
    from mvd_scale.detection.evaluate import evaluate as judge
    from mvd_scale.models.precision import usual_precision
    from mvd_scale.training.ranks import join_ranks, leave_ranks

    ranks = join_ranks(device, timeout_minutes=10)
    figures = judge(
        checkpoint,
        DataConfig(source=source, root=root),
        DetectionTest.model_validate(test),
        out,
        ranks,
        batch=batch,
        precision=precision or usual_precision(ranks.device),
        per_frame=per_frame,
    )
    leave_ranks()
    if ranks.first:
        click.echo(f"{figures.to_text()}\n{out}")


@detect.command()
@click.argument("results", type=_file)
@_annotations
@_actions
@_excluded
@click.option("--out", type=_file, help="Table with a line for each action (.csv).")
@_per_frame
def score(
    results: Path, annotations: Path, actions: Path, excluded: Path | None, out: Path | None, per_frame: int | None
) -> None:
    """Frame mAP of RESULTS in the official form, whichever model made them."""
    from mvd_scale.detection.evaluate import score_results

    judged = score_results(results, annotations, actions, excluded, per_frame)
    if out is not None:
        judged.write(out)
    click.echo(f"frame mAP  {100 * judged.mean:.2f} % over {judged.tested} actions, IoU 0.5")


@detect.command()
@click.option("--out", type=_file, required=True, help="Folder for train/, test/ and their annotations.")
@click.option("--train", type=click.IntRange(min=1), default=40, show_default=True, help="Videos.")
@click.option("--test", type=click.IntRange(min=1), default=10, show_default=True, help="Videos.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def synth(out: Path, train: int, test: int, seed: int) -> None:
    """Make videos of moving textures with AVA's files: what an object is and where it goes are its actions."""
    from mvd_scale.detection.synth import make_detection_set

    click.echo(make_detection_set(out, train=train, test=test, seed=seed))
