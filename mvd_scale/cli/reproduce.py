"""Command `mvd-scale reproduce`: tables of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import WITH_OVERRIDES, IntListType, overrides_argument


@click.command(context_settings=WITH_OVERRIDES)
@click.argument("table")
@click.option(
    "--scale", type=click.Choice(["full", "mini"]), default="mini", show_default=True,
    help="full: write launch files for a cluster; mini: run here, with tiny models and drawn videos.",
)  # fmt: skip
@click.option("--seeds", type=IntListType(), help="Seeds, such as 0,1,2; those of the scale if omitted.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of all that is made; that of the scale if omitted."
)
@click.option(
    "--validation", is_flag=True, help="Judge on validation videos in place of the test's: to choose settings."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Stages side by side at mini scale; one for each CPU if omitted."
)
@click.option("--gpu", default="H100", show_default=True, help="GPU model of the plan at full scale, as of `plan`.")
@click.option("--gpus", type=click.IntRange(min=1), default=32, show_default=True, help="GPUs of each job.")
@click.option("--per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs per host.")
@overrides_argument
def reproduce(
    table: str,
    scale: Any,
    seeds: list[int] | None,
    output: Path | None,
    validation: bool,
    jobs: int | None,
    gpu: str,
    gpus: int,
    per_node: int,
    overrides: tuple[str, ...],
) -> None:
    """Reproduce a TABLE of the paper: table1, table2, table6, table7, table8, table9, or study, which has all of them.

    What is there already is not made again. OVERRIDES are dotted keys of the scale, such as --data.motion.train 20
    """
    from mvd_scale.performance.planning.plan import make_cluster
    from mvd_scale.performance.planning.video_decoding import VideoFormat
    from mvd_scale.reproduction.report import to_text
    from mvd_scale.reproduction.reproduce import reproduce as run

    cluster = make_cluster(
        gpu, gpus, per_node, attention=None, efficiency=None, video=VideoFormat(320, 250, 300, None), videos=240_000
    )
    made = run(
        table,
        scale,
        seeds=seeds,
        output=output,
        split="validation" if validation else "test",
        jobs=jobs,
        cluster=cluster,
        overrides=overrides,
    )
    for stage in made.planned:
        click.echo(f"{stage.name}: {stage.to_text()}")
    click.echo(to_text(made.results))
    click.echo(made.file)
    if made.script is not None:
        click.echo(f"Submit {len(made.planned)} stages, in the folder of the repository: bash {made.script}")
    for name, reason in made.failed.items():
        click.echo(f"{name}: {reason}", err=True)
    if made.failed:
        raise click.exceptions.Exit(1)
