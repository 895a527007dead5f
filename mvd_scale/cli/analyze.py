"""Commands `mvd-scale analyze`: what models see in clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import device_option, positions_option
from mvd_scale.config.training import Precision


@click.group()
def analyze() -> None:
    """Show what models see in clips: similarity of features over time; features, predictions and attention."""


@analyze.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--source", required=True, help="Videos: a manifest, or any other source that `data index` accepts.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for picture and numbers.")
@click.option("--layer", type=click.IntRange(min=1), help="Block whose output is compared; the last one if omitted.")
@click.option(
    "--norm/--no-norm", default=False, show_default=True,
    help="Apply the final norm, after the last block; teachers are used without it.",
)  # fmt: skip
@click.option(
    "--sampling", type=click.Choice(["dense", "uniform"]), default="dense", show_default=True,
    help="Sampling of the clips of each video.",
)  # fmt: skip
@click.option(
    "--stride", type=click.IntRange(min=1), default=4, show_default=True,
    help="For dense sampling, frames from one sampled frame to the next.",
)  # fmt: skip
@click.option("--clips", type=click.IntRange(min=1), default=1, show_default=True, help="Clips of each video.")
@click.option(
    "--frames", type=click.IntRange(min=1), help="Frames per clip to adapt video models to; their own if omitted."
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Videos per batch.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of the models; fp16 on GPUs and fp32 on CPUs if omitted.",
)  # fmt: skip
@positions_option
@click.option("--root", help="Folder or URL to which the paths of a list are relative.")
@device_option
def similarity(
    checkpoints: tuple[str, ...],
    source: str,
    out: Path,
    layer: int | None,
    norm: bool,
    sampling: Any,
    stride: int,
    clips: int,
    frames: int | None,
    batch: int,
    precision: Precision | None,
    positions: Any,
    root: str | None,
    device: str,
) -> None:
    """Compare the feature maps of a clip's time slices by their cosine, averaged over all videos (Figure 3).

    Each CHECKPOINT is a file in any format that `inspect` knows, or a run folder, and may be named: NAME=PATH. All of
    them see the same clips; an image model sees the front frame of each time slice. OUT gets similarity.png, with the
    matrices side by side, and similarity.json. To run on several ranks: launch/single_node.sh analyze similarity ...
    An interrupted command resumes when started again.
    """
    from mvd_scale.analysis.similarity import PICTURE, compute_similarity
    from mvd_scale.analysis.similarity_plot import plot_similarity
    from mvd_scale.analysis.subjects import read_subjects
    from mvd_scale.config.data import DataConfig, ViewsConfig
    from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
    from mvd_scale.evaluation.features import FeatureOptions
    from mvd_scale.models.precision import usual_precision

    views = ViewsConfig(sampling=sampling, stride=stride, clips=clips, crops=1)
    lineup = read_subjects(checkpoints, frames=frames, positions=positions)
    ranks = init_distributed(device, timeout_minutes=10)
    if ranks.is_main:
        for name, reason in lineup.left_out.items():
            click.echo(f"left out: model {name}: {reason}", err=True)
    found = compute_similarity(
        lineup,
        DataConfig(source=source, root=root),
        FeatureOptions(views, layer, pool="none", norm=norm),
        out,
        ranks,
        batch=batch,
        precision=precision or usual_precision(ranks.device),
    )
    destroy_distributed()
    if ranks.is_main:
        plot_similarity(found, out / PICTURE)
        click.echo(f"{found.to_text()}\n{out / PICTURE}")


@analyze.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--video", required=True, help="File or URL of a video.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Picture to write (.png).")
@click.option("--moving", type=click.Path(path_type=Path), help="Also write a moving picture (.gif or .mp4).")
@click.option(
    "--teacher", "teachers", multiple=True, metavar="TARGET=FILE",
    help="Teacher of a target, for students without their run, such as image=mae_b.pth; may be given several times.",
)  # fmt: skip
@click.option(
    "--sampling", type=click.Choice(["dense", "uniform"]),
    help="Sampling of the clip: from the middle of the video, or over all of it; that of the first run, or dense, if "
    "omitted.",
)  # fmt: skip
@click.option(
    "--stride", type=click.IntRange(min=1),
    help="For dense sampling, frames from one sampled frame to the next; that of the first run, or 4, if omitted.",
)  # fmt: skip
@click.option(
    "--frames", type=click.IntRange(min=1), help="Frames per clip to adapt video models to; their own if omitted."
)
@click.option(
    "--mask-ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of tokens that students do not see; that of their run, or the published one, if omitted.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the mask.")
@positions_option
@device_option
def features(
    checkpoints: tuple[str, ...],
    video: str,
    out: Path,
    moving: Path | None,
    teachers: tuple[str, ...],
    sampling: Any,
    stride: int | None,
    frames: int | None,
    mask_ratio: float | None,
    seed: int,
    positions: Any,
    device: str,
) -> None:
    """Draw what models see in a clip of a video: features, predictions of students, and attention.

    Each CHECKPOINT is a file in any format that `inspect` knows, or a run folder, and may be named: NAME=PATH. Colours
    are the first three principal components, fitted over a target and its predictions together. What a model does not
    have, such as a decoder or a teacher, is left out and named; so are models of other clips than the first.
    """
    from mvd_scale.analysis.clip_rows import ClipOptions, Section, analyse_clip
    from mvd_scale.analysis.feature_sheet import check_picture, draw_sheet, write_moving_sheet
    from mvd_scale.analysis.predicted import views_of
    from mvd_scale.analysis.subjects import read_subjects
    from mvd_scale.distributed.process_group import choose_device

    check_picture(out, moving)
    named = dict(word.partition("=")[::2] for word in teachers)
    if not all(named.values()):
        raise click.UsageError("--teacher names a target and a file, such as image=mae_b.pth")
    subjects, clip, left_out = read_subjects(checkpoints, frames=frames, positions=positions)
    options = ClipOptions(
        views_of(subjects, sampling, stride), mask_ratio, seed, {name: Path(file) for name, file in named.items()}
    )
    sections = analyse_clip(video, subjects, clip, options, choose_device(device))
    # Without rows: their notes are on the sheet and in the output, as what is missing of the others.
    sections += [Section(f"{name}: left out", missing=[reason]) for name, reason in left_out.items()]
    draw_sheet(sections, out)
    if moving is not None:
        write_moving_sheet(sections, moving)
    for section in sections:
        for missing in section.missing:
            click.echo(f"{section.title.partition(':')[0]}: {missing}")
    click.echo("\n".join(str(file) for file in (out, moving) if file is not None))
