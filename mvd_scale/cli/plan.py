"""`mvd-scale plan`."""

from __future__ import annotations

import click

from mvd_scale.cli.options import WITH_OVERRIDES, overrides_argument


@click.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", required=True, help="A recipe of pre-training or fine-tuning.")
@click.option("--gpu", default="H100", show_default=True, help="V100, A100, H100, H200 or B200.")
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="How many.")
@click.option("--per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of a machine.")
@click.option("--stage", type=click.IntRange(1, 3), help="ZeRO stage; as the recipe says if left out.")
@click.option(
    "--attention", type=click.Choice(["flash-attn", "sdpa"]), help="Kernel; the fastest that the GPU has if left out."
)
@click.option(
    "--efficiency", type=click.FloatRange(0, 1, min_open=True),
    help="Share of the peak that arithmetic reaches; an assumption by GPU, kernel and width if left out.",
)  # fmt: skip
@click.option("--videos", type=click.IntRange(min=1), default=240_000, show_default=True, help="Of an epoch.")
@click.option("--height", type=click.IntRange(min=1), default=320, show_default=True, help="Short side of the videos.")
@click.option(
    "--keyframes", type=click.IntRange(min=1), default=250, show_default=True, help="Frames between two key frames."
)
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
    keyframes: int,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Predict a run on GPUs: FLOPs, memory, communication, decoding, time, what limits it, the best micro batch.

    OVERRIDES are dotted keys of the recipe: --teachers.sharding zero3
    """
    from mvd_scale.performance.decoding import Video
    from mvd_scale.performance.plan import make_cluster, make_plan, with_stage
    from mvd_scale.performance.plan_text import to_json, to_text

    cluster = make_cluster(
        gpu, gpus, per_node, attention=attention, efficiency=efficiency, video=Video(height, keyframes), videos=videos
    )  # fmt: skip
    made = make_plan(recipe, with_stage(list(overrides), stage), cluster)
    click.echo(to_json(made) if as_json else to_text(made))
