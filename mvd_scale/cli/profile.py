"""Command `mvd-scale profile`: training steps under torch's profiler."""

from __future__ import annotations

from pathlib import Path

import click

from mvd_scale.cli.options import WITH_OVERRIDES, overrides_argument
from mvd_scale.config.launcher import env_rank
from mvd_scale.config.training import Precision


@click.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe whose steps are profiled.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of the student; fp16 on GPUs and fp32 on CPUs if omitted.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Clips per step.")
@click.option("--steps", type=click.IntRange(min=1), default=2, show_default=True, help="Number of profiled steps.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@overrides_argument
def profile(
    recipe: str, precision: Precision | None, batch: int, steps: int, out: Path, overrides: tuple[str, ...]
) -> None:
    """Run training steps under torch's profiler, and write traces, time by part, utilisation, communication and memory.

    Teachers have random weights unless the recipe names their checkpoints.
    """
    from mvd_scale.performance.profiling.profile import profile_recipe

    report = profile_recipe(recipe, list(overrides), out, precision=precision, batch=batch, steps=steps)
    if env_rank() == 0:
        click.echo(report.to_text())
        click.echo(f"\nwritten to {out}: summary, traces, memory.png, modules.txt")
