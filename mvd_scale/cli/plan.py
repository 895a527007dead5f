"""Commands `mvd-scale plan`, a prediction of time and memory of a run, and `mvd-scale tables`, the sizes of models."""

from __future__ import annotations

from typing import Any

import click

from mvd_scale.cli.options import WITH_OVERRIDES, overrides_argument


@click.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", required=True, help="Recipe of pre-training or fine-tuning, a shipped name or a path.")
@click.option("--gpu", default="H100", show_default=True, help="GPU model: V100, A100, H100, H200 or B200.")
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="Number of GPUs.")
@click.option("--per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs per host.")
@click.option(
    "--stage",
    type=click.IntRange(1, 3),
    help="ZeRO stage of students that name no DeepSpeed file of their own; that of the recipe if omitted.",
)
@click.option(
    "--attention", type=click.Choice(["flash-attn", "sdpa"]),
    help="Attention kernel; the fastest one that the GPU supports if omitted.",
)  # fmt: skip
@click.option(
    "--efficiency", type=click.FloatRange(0, 1, min_open=True),
    help="Share of the peak FLOP/s that is reached; assumed by GPU, kernel and width if omitted.",
)  # fmt: skip
@click.option("--videos", type=click.IntRange(min=1), default=240_000, show_default=True, help="Videos of an epoch.")
@click.option(
    "--height", type=click.IntRange(min=1), default=320, show_default=True, help="Short side of the videos in pixels."
)
@click.option(
    "--width", type=click.IntRange(min=1), help="Long side of the videos in pixels; by the aspect 4:3 if omitted."
)
@click.option(
    "--keyframes", type=click.IntRange(min=1), default=250, show_default=True,
    help="Frames from one keyframe of the videos to the next.",
)  # fmt: skip
@click.option(
    "--video-frames", type=click.IntRange(min=1), default=300, show_default=True,
    help="Frames of a video; counts where data.sampling spans whole videos.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@overrides_argument
def plan(
    recipe: str,
    gpu: str,
    gpus: int,
    per_node: int,
    stage: int | None,
    attention: str | None,
    efficiency: float | None,
    videos: int,
    height: int,
    width: int | None,
    keyframes: int,
    video_frames: int,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Predict a run on GPUs: FLOPs, memory, communication, decoding, time, the bottleneck, the best micro batch.

    OVERRIDES are dotted keys of the recipe, such as --teachers.sharding zero3
    """
    from mvd_scale.performance.planning.plan import make_cluster, make_plan, with_stage
    from mvd_scale.performance.planning.plan_report import to_json, to_text
    from mvd_scale.performance.planning.video_decoding import VideoFormat

    video = VideoFormat(height, keyframes, video_frames, width)
    cluster = make_cluster(
        gpu, gpus, per_node, attention=attention, efficiency=efficiency, video=video, videos=videos
    )  # fmt: skip
    made = make_plan(recipe, with_stage(list(overrides), stage), cluster)
    click.echo(to_json(made) if as_json else to_text(made))


@click.command()
@click.option(
    "--size", "sizes", type=click.Choice(["S", "B", "L", "H"]), multiple=True,
    help="Size to show; may be given several times. All if omitted.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def tables(sizes: tuple[Any, ...], as_json: bool) -> None:
    """Print parameters and multiply-accumulates of the models of Tables 3 and 4, beside the published ones."""
    from mvd_scale.performance.planning import published_models

    models = published_models.compute_models(sizes or published_models.SIZES)
    click.echo(published_models.to_json(models) if as_json else published_models.to_text(models))
