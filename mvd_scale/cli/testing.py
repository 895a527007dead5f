"""Commands that apply a trained model: `evaluate`, `predict`, `ensemble`, `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import command_line, device_option, positions_option, precision_option, view_options
from mvd_scale.config.training import FrozenPrecision, Precision


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for scores and figures.")
@view_options
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Videos per batch.")
@precision_option
@positions_option
@click.option("--root", help="Folder or URL to which the paths of a list are relative.")
@device_option
@click.option(
    "--report", "page", type=click.Path(path_type=Path), help="Also write the page of `mvd-scale report` to this file."
)
def evaluate(
    checkpoint: Path,
    source: str,
    out: Path,
    page: Path | None,
    batch: int,
    precision: FrozenPrecision | None,
    positions: Any,
    root: str | None,
    device: str,
    **views: Any,
) -> None:
    """Test a fine-tuned CHECKPOINT on the videos of SOURCE with several views per video.

    CHECKPOINT is a file of weights or a run folder. Of a run the last weights are tested; those of the best validation
    are tested if RUN/best.safetensors is named. SOURCE is a manifest, or any other source that `data index` accepts.
    Published tests use 5 x 3 dense views on
    Kinetics, UCF101 and HMDB51, and 2 x 3 uniform views on Something-Something. An interrupted command resumes when
    started again.
    """
    from mvd_scale.checkpoints import Hints, read_checkpoint
    from mvd_scale.config.data import DataConfig
    from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
    from mvd_scale.evaluation.evaluate import run_evaluation
    from mvd_scale.models.precision import usual_precision
    from mvd_scale.visualization.html_report import write_report

    ranks = init_distributed(device, timeout_minutes=10)
    tested = run_evaluation(
        read_checkpoint(checkpoint, Hints(positions=positions)),
        DataConfig(source=source, root=root),
        {name: value for name, value in views.items() if value is not None},
        out,
        ranks,
        batch=batch,
        precision=precision or usual_precision(ranks.device),
        command=command_line(),
    )
    destroy_distributed()
    if ranks.is_main:
        click.echo(f"{tested.to_text()}\n{out}")
        if page is not None:
            write_report(out, page)
            click.echo(page)


@click.command()
@click.argument("videos", nargs=-1, required=True, metavar="VIDEO...")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), required=True,
    help="Fine-tuned weights, or a run folder, which means its last weights.",
)  # fmt: skip
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Number of classes to print.")
@view_options
@precision_option
@positions_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per video instead of text.")
def predict(videos: tuple[str, ...], checkpoint: Path, top: int, as_json: bool, **options: Any) -> None:
    """Print the most likely classes of each VIDEO, a file or URL.

    Fewer views are faster, such as --clips 1 --crops 1.
    """
    from mvd_scale.evaluation.predict import load_classifier
    from mvd_scale.evaluation.predict import predict as name_classes

    for prediction in name_classes(load_classifier(checkpoint, **options), videos, top):
        click.echo(prediction.to_json() if as_json else prediction.to_text())


@click.command()
@click.argument("tests", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TEST...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for scores and figures.")
def ensemble(tests: tuple[Path, ...], out: Path) -> None:
    """Average the scores of several models.

    Each TEST is a folder that `evaluate` wrote, all of them for the same videos.
    """
    from mvd_scale.evaluation.evaluate import ensemble_results

    click.echo(f"{ensemble_results(tests, out, command_line()).to_text()}\n{out}")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the shards of features.")
@click.option(
    "--layer", type=click.IntRange(min=1), help="Block whose output is taken, from 1; the last block if omitted."
)
@click.option(
    "--pool", type=click.Choice(["clip", "time", "none"]), default="clip", show_default=True,
    help="clip: mean over all tokens of a clip; time: mean over the tokens of each time slice; none: every token.",
)  # fmt: skip
@click.option("--norm/--no-norm", default=True, show_default=True, help="Apply the final norm, after the last block.")
@click.option(
    "--sampling", type=click.Choice(["dense", "uniform", "sliding"]), default="dense", show_default=True,
    help="Sampling of the clips of each video.",
)  # fmt: skip
@click.option(
    "--stride", type=click.IntRange(min=1), default=4, show_default=True,
    help="For dense and sliding sampling, frames from one sampled frame to the next.",
)  # fmt: skip
@click.option(
    "--every", type=click.IntRange(min=1),
    help="For sliding sampling, frames from the start of one clip to the start of the next.",
)  # fmt: skip
@click.option("--clips", type=click.IntRange(min=1), default=1, show_default=True, help="Clips in time.")
@click.option("--crops", type=click.IntRange(min=1), default=1, show_default=True, help="Crops per clip.")
@click.option(
    "--format", "kind", type=click.Choice(["safetensors", "parquet"]), default="safetensors", show_default=True,
    help="File format of the shards.",
)  # fmt: skip
@click.option("--shard", type=click.IntRange(min=1), default=256, show_default=True, help="Videos per shard.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Videos per batch.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of the encoder; fp16 on GPUs and fp32 on CPUs if omitted.",
)  # fmt: skip
@positions_option
@click.option("--root", help="Folder or URL to which the paths of a list are relative.")
@device_option
def features(
    checkpoint: Path,
    source: str,
    out: Path,
    layer: int | None,
    pool: Any,
    norm: bool,
    sampling: Any,
    stride: int,
    every: int | None,
    clips: int,
    crops: int,
    kind: Any,
    shard: int,
    batch: int,
    precision: Precision | None,
    positions: Any,
    root: str | None,
    device: str,
) -> None:
    """Write features of the videos of SOURCE, computed by the encoder of a CHECKPOINT, into shards.

    CHECKPOINT is in any format that `inspect` knows; of a run folder the last weights are read. SOURCE is a manifest,
    or any other source that `data index` accepts. To run on several ranks: launch/single_node.sh features ... An
    interrupted command resumes when started again.
    """
    from mvd_scale.checkpoints import Hints, read_checkpoint
    from mvd_scale.config.data import DataConfig, ViewsConfig
    from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
    from mvd_scale.evaluation.features import FeatureOptions, write_features
    from mvd_scale.models.precision import usual_precision

    if (every is not None) != (sampling == "sliding"):
        raise click.UsageError("--every and --sampling sliding require each other: give both or neither")
    views = ViewsConfig(sampling=sampling, stride=stride, every=every, clips=clips, crops=crops)
    ranks = init_distributed(device, timeout_minutes=10)
    written, failed = write_features(
        read_checkpoint(checkpoint, Hints(positions=positions)),
        DataConfig(source=source, root=root),
        FeatureOptions(views, layer, pool, norm, kind, shard),
        out,
        ranks,
        batch=batch,
        precision=precision or usual_precision(ranks.device),
    )
    destroy_distributed()
    if ranks.is_main:
        note = f"; {failed} videos cannot be decoded, see {out / 'quarantine.jsonl'}" if failed else ""
        click.echo(f"{out}: features of {written} views{note}")
