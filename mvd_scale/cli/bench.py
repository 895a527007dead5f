"""Command `mvd-scale bench`: measurements of speed and memory."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

from mvd_scale.cli.options import WITH_OVERRIDES, IntListType, overrides_argument, precision_option
from mvd_scale.config.launcher import env_rank
from mvd_scale.config.training import FrozenPrecision, Precision


@click.group()
def bench() -> None:
    """Measure speed and memory on this machine."""


@bench.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe whose step is timed.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of the student; fp16 on GPUs and fp32 on CPUs if omitted.",
)
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Clips per step.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Number of timed steps.")
@click.option(
    "--methods",
    help="Instead of a recipe, compare methods of the paper with co-teaching: all, or names separated by commas.",
)
@click.option("--checkpointing", is_flag=True, help="Compare all values of training.gradient_checkpointing.")
@click.option(
    "--roofline", is_flag=True,
    help="Compare the step with its work at the rates of this machine, in as many rounds as --steps.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@overrides_argument
def step(
    recipe: str,
    precision: Precision | None,
    batch: int,
    steps: int,
    methods: str | None,
    checkpointing: bool,
    roofline: bool,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Time the parts of one optimizer step: data, each teacher, student forward, backward, optimizer.

    On a GPU, the command synchronises after each part; `mvd-scale profile` times steps whose parts overlap as in
    training.
    """
    from mvd_scale.performance.benchmarks.step import measure_step
    from mvd_scale.performance.report import Report
    from mvd_scale.performance.roofline.measure import measure_roofline

    if methods is not None or checkpointing:
        from mvd_scale.performance.benchmarks.methods import measure_checkpointing, measure_methods

        words = ["--batch", str(batch), "--steps", str(steps), *overrides]
        words += [] if precision is None else ["--precision", precision]
        if methods is not None:
            _refuse_beside("methods", "recipe", "checkpointing", "roofline")
            table = measure_methods(methods, words)
        else:
            _refuse_beside("checkpointing", "roofline")
            table = measure_checkpointing(["--recipe", recipe, *words])
        click.echo(table.to_json() if as_json else table.to_text())
        return
    report: Report
    if roofline:
        report = measure_roofline(recipe, list(overrides), precision=precision, batch=batch, rounds=steps)
    else:
        report = measure_step(recipe, list(overrides), precision=precision, batch=batch, steps=steps)
    if env_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="distill/sb_from_b", show_default=True, help="Recipe of several students.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of the students; fp16 on GPUs and fp32 on CPUs if omitted.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Clips per step.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of timed steps of every run."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@overrides_argument
def students(
    recipe: str, precision: Precision | None, batch: int, rounds: int, as_json: bool, overrides: tuple[str, ...]
) -> None:
    """Time a step of several students in one run, and of each in a run of its own; the runs take turns step by step."""
    from mvd_scale.performance.benchmarks.students import measure_students

    report = measure_students(recipe, list(overrides), precision=precision, batch=batch, rounds=rounds)
    if env_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe whose teachers are timed.")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Number of timed calls.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@overrides_argument
def teachers(recipe: str, steps: int, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Time frozen teachers in each precision, and compare their features with those in float32."""
    from mvd_scale.performance.benchmarks.teachers import measure_teachers

    report = measure_teachers(recipe, list(overrides), steps=steps)
    click.echo(report.to_json() if as_json else report.to_text())


@bench.command("data")
@click.argument("source", required=False)
@click.option("--workers", type=IntListType(), default="1,2", show_default=True, help="Counts of workers to time.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds, with a turn of each loader."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Length of a turn."
)
@click.option(
    "--large/--no-large", default=True, show_default=True, help="Without SOURCE, also time videos of 1280x720 pixels."
)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for encoded videos; a temporary one if omitted.")
@click.option(
    "--memory", type=click.IntRange(min=80), metavar="CLIPS",
    help="Instead of times, measure memory while loading this number of clips.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def bench_data(
    source: str | None,
    workers: list[int],
    rounds: int,
    seconds: float,
    large: bool,
    work: Path | None,
    memory: int | None,
    as_json: bool,
) -> None:
    """Time the training loader and loaders by SPDL, decord, torchcodec and PyAV on the same clips, in turns.

    Loaders whose package is missing, or that fail, are listed with the reason; the extra `bench` installs the
    packages. A second table says where the CPU time of a clip goes. Progress goes to standard error.

    SOURCE is a manifest, or any other source that `data index` accepts. If it is omitted, real pictures are encoded to
    videos of 10 s.
    """
    import tempfile

    from mvd_scale.performance.benchmarks.data.data_loading import measure_data, measure_memory

    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        if memory is not None:
            _refuse_beside("memory", "workers", "rounds", "seconds", "large", "as_json")
            for drawn, mib in measure_memory(source, folder, memory):
                click.echo(f"{drawn:>8} clips  {mib:8.1f} MiB")
            return
        report = measure_data(
            source,
            folder,
            workers=workers,
            rounds=rounds,
            seconds=seconds,
            large=large,
            say=partial(click.echo, err=True),
        )
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command("eval")
@click.argument("source", required=False)
@click.option("--videos", type=click.IntRange(min=1), default=12, show_default=True, help="Videos timed per loader.")
@click.option(
    "--size", type=click.Choice(["none", "S", "B", "L", "H"]), default="S", show_default=True,
    help="Size of the classifier; with `none`, only the loading of the views is timed.",
)  # fmt: skip
@precision_option
@click.option(
    "--workers", type=click.IntRange(min=0), help="Number of worker processes; the number of CPU cores if omitted."
)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for encoded videos; a temporary one if omitted.")
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
    """Time the test with 5 x 3 views, and baseline loaders that decode a video again for every view or clip.

    --precision applies to the classifier of this package; the baselines use fp16 on GPUs and fp32 on CPUs. SOURCE is a
    manifest, or any other source that `data index` accepts. If it is omitted, real pictures are encoded to videos of
    10 s.
    """
    import tempfile

    from mvd_scale.performance.benchmarks.data.evaluation import measure_evaluation

    with tempfile.TemporaryDirectory() as scratch:
        report = measure_evaluation(
            source,
            work or Path(scratch),
            videos=videos,
            size=None if size == "none" else size,
            precision=precision,
            workers=len(os.sched_getaffinity(0)) if workers is None else workers,
        )
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command()
@click.option(
    "--size", type=click.Choice(["S", "B", "L", "H"]), default="H", show_default=True, help="Size of the teacher."
)
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
    help="Precision of the teacher.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
    help="Device of the shards.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def load(size: str, precision: Precision, device: str, as_json: bool) -> None:
    """Time the loading of a teacher into ZeRO-3 shards, and measure its memory; start this on several ranks."""
    from mvd_scale.performance.benchmarks.teacher_loading import measure_load

    report = measure_load(size, precision, device)
    if env_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe of distillation to measure.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of the student; fp16 on GPUs and fp32 on CPUs if omitted.",
)
@click.option(
    "--sides", type=IntListType(or_none=True), default="112,160,224,288", show_default=True,
    help="Input sides in pixels, which vary the tokens.",
)  # fmt: skip
@click.option("--frames", type=IntListType(or_none=True), default="8,16,32", show_default=True, help="Frames per clip.")
@click.option("--batches", type=IntListType(or_none=True), default="1,2,4,8", show_default=True, help="Clips per step.")
@click.option(
    "--depths", type=IntListType(or_none=True), default="3,6,12,24", show_default=True,
    help="Blocks of the student's encoder and of each teacher.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True,
    help="Clips per step while other quantities vary.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=2, show_default=True, help="Timed steps per point.")
@click.option("--png", type=click.Path(path_type=Path), help="Plot to write (.png).")
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
    """Measure how time and memory of a step grow with tokens, frames, batch and depth, and fit the exponents.

    One quantity varies at a time; the others have the values of the recipe. `none` skips a quantity. Each point is
    measured in a separate process.
    """
    from mvd_scale.performance.benchmarks.scaling import Quantity, measure_growth
    from mvd_scale.performance.benchmarks.scaling_plot import plot_growth

    numbers: dict[Quantity, list[int]] = {"tokens": sides, "frames": frames, "batch": batches, "depth": depths}
    report = measure_growth(recipe, list(overrides), numbers, precision=precision, batch=batch, steps=steps)
    click.echo(report.to_json() if as_json else report.to_text())
    if png is not None:
        plot_growth(report, png)


@bench.command()
@click.option(
    "--size", type=click.Choice(["S", "B", "L", "H"]), default="B", show_default=True, help="Size of the model."
)
@click.option("--deepspeed", default="zero2", show_default=True, help="DeepSpeed file, see training.deepspeed.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Precision of the model; fp16 on GPUs and fp32 on CPUs if omitted.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
    help="Device of the model.",
)  # fmt: skip
@click.option("--saves", type=click.IntRange(min=1), default=3, show_default=True, help="Number of saves.")
@click.option(
    "--work", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder to write to, which all ranks see; a temporary one if omitted.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def checkpoint(
    size: str, deepspeed: str, precision: Precision | None, device: str, saves: int, work: Path | None, as_json: bool
) -> None:
    """Time how long a save keeps the training waiting, until it is durable, and a resume; start this on all ranks."""
    from mvd_scale.performance.benchmarks.checkpointing import measure_checkpoint

    report = measure_checkpoint(size, deepspeed, precision, device, saves=saves, work=work)
    if env_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command(context_settings=WITH_OVERRIDES)
@click.option("--recipe", default="quickstart/video_teacher", show_default=True, help="Recipe to train.")
@click.option("--steps", type=click.IntRange(min=4), default=2000, show_default=True, help="Number of steps.")
@click.option("--saves", type=click.IntRange(min=1), default=20, show_default=True, help="Number of checkpoints.")
@click.option("--png", type=click.Path(path_type=Path), help="Plot to write (.png).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@overrides_argument
def endurance(recipe: str, steps: int, saves: int, png: Path | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Sample memory, open files and keys in the store over many steps and saves; start this on all ranks."""
    from mvd_scale.performance.benchmarks.endurance import measure_endurance, plot_endurance

    report = measure_endurance(recipe, list(overrides), steps=steps, saves=saves)
    if env_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())
        if png is not None:
            plot_endurance(report, png)


@bench.command()
@click.option(
    "--ranks", type=IntListType(), default="16,64,256", show_default=True,
    help="Numbers of ranks that threads stand for.",
)  # fmt: skip
@click.option(
    "--target", type=click.IntRange(min=1), default=4096, show_default=True,
    help="Number of ranks to which costs are extrapolated.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def ranks(ranks: list[int], target: int, as_json: bool) -> None:
    """Count how the traffic on the store and the planning of checkpoints grow with ranks, and fit the exponents.

    Ranks are threads which run what a run says to the others; no model computes, so that a laptop can stand for a
    cluster.
    """
    import tempfile

    from mvd_scale.performance.benchmarks.rank_growth import measure_ranks

    with tempfile.TemporaryDirectory() as scratch:
        report = measure_ranks(ranks, target, Path(scratch))
    click.echo(report.to_json() if as_json else report.to_text())


@bench.command()
@click.option(
    "--rows", type=IntListType(), default="100000,1000000,10000000", show_default=True,
    help="Numbers of rows; 1,000 rows are measured as well.",
)  # fmt: skip
@click.option(
    "--workers", type=IntListType(), default="0,2", show_default=True, help="Counts of worker processes to start."
)
@click.option(
    "--work", type=click.Path(path_type=Path),
    help="Folder for videos, manifests and mapped files, 4 GB for 10 million rows; a temporary one if omitted.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def manifest(rows: list[int], workers: list[int], work: Path | None, as_json: bool) -> None:
    """Measure private memory of each process and seconds to the first batch, by rows of the manifest.

    The rows have different paths, which all lead to four small videos.
    """
    import tempfile

    from mvd_scale.performance.benchmarks.data.manifest_size import measure_manifest

    with tempfile.TemporaryDirectory() as scratch:
        report = measure_manifest(rows, workers, work or Path(scratch))
    click.echo(report.to_json() if as_json else report.to_text())


@bench.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True,
    help="Relative change up to which two figures count as equal.",
)  # fmt: skip
def compare(old: Path, new: Path, tolerance: float) -> None:
    """Compare two reports, OLD and NEW, of the same kind; exit with code 1 if a figure became worse.

    A report is the output of another `bench` command with --json, or the file summary.json of `mvd-scale profile`.
    """
    from mvd_scale.performance.compare import compare_reports

    comparison = compare_reports(old, new, tolerance)
    click.echo(comparison.to_text())
    if comparison.worse:
        click.get_current_context().exit(1)


def _refuse_beside(option: str, *others: str) -> None:
    """Refuse options on the command line that have no effect together with `option`.

    Raises:
        click.UsageError: one of `others` was given.
    """
    context = click.get_current_context()
    given = [name for name in others if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        raise click.UsageError(
            f"--{given[0].removeprefix('as_')} cannot be combined with --{option}: remove one of them"
        )
