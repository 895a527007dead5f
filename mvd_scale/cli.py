"""The command `mvd-scale`: one thin function per subcommand."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import click

from mvd_scale import __version__
from mvd_scale.errors import UserError
from mvd_scale.logs import configure, launched_rank

logger = logging.getLogger("mvd_scale")

_recipe_command: dict[str, Any] = {"context_settings": {"ignore_unknown_options": True}}
_overrides = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mvd-scale")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def cli(debug: bool) -> None:
    """Masked Video Distillation at scale."""


@cli.command(**_recipe_command)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@_overrides
def pretrain(recipe: str, overrides: tuple[str, ...]) -> None:
    """Train what a recipe says; resume when its run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe: --training.epochs 3 --data.source videos/
    """
    from mvd_scale.config import load_recipe
    from mvd_scale.training.pretrain import pretrain as run
    from mvd_scale.training.resilience import Stopped

    try:
        run(load_recipe(recipe, list(overrides)))
    except Stopped as stop:
        logger.warning("stopped as asked, after saving; the same command goes on from here")
        sys.exit(stop.exit_code)


@cli.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from mvd_scale.config import list_recipes

    names = list_recipes()
    width = max(map(len, names))
    for name, head in names.items():
        click.echo(f"{name:{width}}  {head}")


@cli.command()
def schema() -> None:
    """Print every key of a recipe with its type, default and meaning, as JSON Schema."""
    import json

    from mvd_scale.config import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@cli.command()
def env() -> None:
    """Show what this machine can do, and why what is off is off."""
    from mvd_scale.capabilities import probe, table

    click.echo(table(probe()))


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quickstart"), show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Processes of every stage.")
@click.option("--steps", type=click.IntRange(min=1), help="Stop every stage after so many steps.")
def quickstart(out: Path, ranks: int, steps: int | None) -> None:
    """Train two teachers on real clips and distil a student from both, on any machine."""
    from mvd_scale.quickstart import run

    run(out, ranks, steps)


@cli.group()
def data() -> None:
    """Videos and manifests."""


@data.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Manifest to write (.parquet).")
@click.option("--root", type=click.Path(path_type=Path), help="Folder that relative paths of a list start from.")
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Files read at a time.")
def index(source: Path, out: Path, root: Path | None, workers: int) -> None:
    """Probe every video of SOURCE (a folder, or a file of `path label` lines) once and write a manifest."""
    from mvd_scale.data.index import build_manifest

    manifest = build_manifest(source, root, workers=workers)
    manifest.save(out)
    click.echo(f"{out}: {len(manifest)} videos, {len(manifest) - len(manifest.usable)} left out")


@data.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the clips.")
def samples(out: Path) -> None:
    """Cut the real videos of the `samples` extra into short clips."""
    from mvd_scale.data.samples import make_samples

    click.echo(make_samples(out))


@cli.group()
def bench() -> None:
    """Measure speed and memory on this machine."""


@bench.command(**_recipe_command)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe whose step is measured.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Clips of a step.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Steps that are timed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@_overrides
def step(recipe: str, batch: int, steps: int, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Time one optimizer step by part: data, each teacher, student forward, backward, optimizer."""
    from mvd_scale.performance.step import measure_step

    report = measure_step(recipe, list(overrides), batch=batch, steps=steps)
    if launched_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


def main() -> None:
    """Entry point: user errors are one message and exit code 2; `--debug` adds the traceback."""
    debug = "--debug" in sys.argv
    if debug:
        # Accepted anywhere on the line.
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    configure()
    try:
        cli(prog_name="mvd-scale")
    except UserError as error:
        if debug:
            raise
        _speak_once()
        click.echo(f"mvd-scale: {error}", err=True)
        sys.exit(2)


def _speak_once() -> None:
    """Let rank 0 say an error that all ranks share: its exit makes the launcher end the others before they speak."""
    if launched_rank():
        time.sleep(5)
