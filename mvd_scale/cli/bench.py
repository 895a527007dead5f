"""`mvd-scale bench`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.core import ParameterSource

from mvd_scale.cli.options import WITH_OVERRIDES, Numbers, frozen_precision, overrides_argument
from mvd_scale.config.launcher import launched_rank
from mvd_scale.config.training import FrozenPrecision, Precision


@click.group()
def bench() -> None:
    """Measure speed and memory on this machine."""


@bench.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe whose step is measured.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp16 on GPUs and fp32 on CPUs if left out."
)
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Clips of a step.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Steps that are timed.")
@click.option("--methods", help="Instead of a recipe: all, or some methods of the paper, beside co-teaching.")
@click.option("--checkpointing", is_flag=True, help="By each choice of training.gradient_checkpointing, side by side.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@overrides_argument
def step(
    recipe: str,
    precision: Precision | None,
    batch: int,
    steps: int,
    methods: str | None,
    checkpointing: bool,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Time one optimizer step by part: data, each teacher, student forward, backward, optimizer.

    On a GPU parts are waited for one by one; `mvd-scale profile` times steps whose parts overlap as in training.
    """
    from mvd_scale.performance.step import measure_step

    if methods is not None or checkpointing:
        from mvd_scale.performance.methods import measure_checkpointing, measure_methods

        words = ["--batch", str(batch), "--steps", str(steps), *overrides]
        words += [] if precision is None else ["--precision", precision]
        if methods is not None:
            _refuse_beside("methods", "recipe", "checkpointing")
            table = measure_methods(methods, words)
        else:
            table = measure_checkpointing(["--recipe", recipe, *words])
        click.echo(table.to_json() if as_json else table.to_text())
        return
    report = measure_step(recipe, list(overrides), precision=precision, batch=batch, steps=steps)
    if launched_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe whose teachers are measured.")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Calls that are timed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@overrides_argument
def teachers(recipe: str, steps: int, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Time frozen teachers in each precision, beside how true their features are to those in float32."""
    from mvd_scale.performance.teachers import measure_teachers

    report = measure_teachers(recipe, list(overrides), steps=steps)
    click.echo(report.to_json() if as_json else report.to_text())


@bench.command("data")
@click.argument("source", required=False)
@click.option("--workers", type=Numbers(), default="0,1,2", show_default=True, help="Worker processes to try.")
@click.option("--clips", type=click.IntRange(min=8), default=128, show_default=True, help="Clips timed for each way.")
@click.option("--large/--no-large", default=True, show_default=True, help="Also 1280x720, without SOURCE.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder that keeps the videos made; a temporary one.")
@click.option("--memory", type=click.IntRange(min=80), metavar="CLIPS", help="Instead: memory while drawing so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def bench_data(
    source: str | None,
    workers: list[int],
    clips: int,
    large: bool,
    work: Path | None,
    memory: int | None,
    as_json: bool,
) -> None:
    """Time the data path beside decord, torchcodec and PyAV over the same videos.

    SOURCE is a manifest or whatever `data index` takes; without it, real pictures are encoded into clips of 10 s.
    """
    import tempfile

    from mvd_scale.performance.data import measure_data, measure_memory

    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        if memory is not None:
            _refuse_beside("memory", "workers", "clips", "large", "as_json")
            for drawn, mib in measure_memory(source, folder, memory):
                click.echo(f"{drawn:>8} clips  {mib:8.1f} MiB")
            return
        report = measure_data(source, folder, workers=workers, clips=clips, large=large)
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command("eval")
@click.argument("source", required=False)
@click.option("--videos", type=click.IntRange(min=1), default=12, show_default=True, help="Videos timed for each way.")
@click.option(
    "--size", type=click.Choice(["none", "S", "B", "L", "H"]), default="S", show_default=True,
    help="Classifier of the whole test; none times the loading of the views alone.",
)  # fmt: skip
@frozen_precision
@click.option("--workers", type=click.IntRange(min=0), help="Worker processes; the number of cores if left out.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder that keeps the videos made; a temporary one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def bench_eval(
    source: str | None,
    videos: int,
    size: str,
    precision: FrozenPrecision | None,
    workers: int | None,
    work: Path | None,
    as_json: bool,
) -> None:
    """Time the test by 5 x 3 views beside plain ways, which decode a video anew for every view or clip.

    The precision is of our classifier; that of the plain ways stays fp16 on GPUs and fp32 on CPUs.
    SOURCE is a manifest or whatever `data index` takes; without it, real pictures are encoded into clips of 10 s.
    """
    import tempfile

    from mvd_scale.performance.testing import measure_testing

    with tempfile.TemporaryDirectory() as scratch:
        report = measure_testing(
            source,
            work or Path(scratch),
            videos=videos,
            size=None if size == "none" else size,
            precision=precision,
            workers=len(os.sched_getaffinity(0)) if workers is None else workers,
        )
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command()
@click.option("--size", type=click.Choice(["S", "B", "L", "H"]), default="H", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def load(size: str, precision: Precision, device: str, as_json: bool) -> None:
    """Time the loading of a teacher into ZeRO-3 shards and measure its memory; start it on several ranks."""
    from mvd_scale.performance.load import measure_load

    report = measure_load(size, precision, device)
    if launched_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Distillation that is measured.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp16 on GPUs and fp32 on CPUs if left out."
)
@click.option(
    "--sides", type=Numbers(or_none=True), default="112,160,224,288", show_default=True, help="Of frames, in pixels."
)
@click.option("--frames", type=Numbers(or_none=True), default="8,16,32", show_default=True, help="Of a clip.")
@click.option("--batches", type=Numbers(or_none=True), default="1,2,4,8", show_default=True, help="Clips of a step.")
@click.option(
    "--depths", type=Numbers(or_none=True), default="3,6,12,24", show_default=True,
    help="Blocks of the student's encoder and of its teachers alike.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Where it does not vary.")
@click.option("--steps", type=click.IntRange(min=1), default=2, show_default=True, help="Steps timed for each point.")
@click.option("--png", type=click.Path(path_type=Path), help="Picture to draw.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@overrides_argument
def growth(
    recipe: str,
    precision: Precision | None,
    sides: list[int],
    frames: list[int],
    batches: list[int],
    depths: list[int],
    batch: int,
    steps: int,
    png: Path | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Measure how time and memory of a step grow with tokens, frames, batch and depth, and by which power.

    One of them varies at a time, the others are as in the recipe; `none` leaves one out. Each point is measured in a
    process of its own.
    """
    from mvd_scale.performance.growth import Quantity, measure_growth
    from mvd_scale.performance.growth_picture import draw_growth

    numbers: dict[Quantity, list[int]] = {"tokens": sides, "frames": frames, "batch": batches, "depth": depths}
    report = measure_growth(recipe, list(overrides), numbers, precision=precision, batch=batch, steps=steps)
    click.echo(report.to_json() if as_json else report.to_text())
    if png is not None:
        draw_growth(report, png)


@bench.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True,
    help="Relative change up to which a figure is the same.",
)  # fmt: skip
def compare(old: Path, new: Path, tolerance: float) -> None:
    """Compare two reports of one kind; exit code 1 if anything became worse.

    Reports are what the other commands print by --json, or the summary.json of a profile.
    """
    from mvd_scale.performance.compare import compare_reports

    comparison = compare_reports(old, new, tolerance)
    click.echo(comparison.to_text())
    if comparison.worse:
        click.get_current_context().exit(1)


def _refuse_beside(option: str, *others: str) -> None:
    """Options that would do nothing beside another one."""
    context = click.get_current_context()
    given = [name for name in others if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        raise click.UsageError(f"--{given[0].removeprefix('as_')} does not go with --{option}")
