"""The command `mvd-scale`: one thin function per subcommand, grouped in files."""

from __future__ import annotations

import sys
import time

import click

from mvd_scale import __version__
from mvd_scale.cli import about, bench, data, detection, plan, probe, profile, testing, training, weights
from mvd_scale.config.launcher import launched_rank
from mvd_scale.errors import UserError
from mvd_scale.logs import configure


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mvd-scale")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def cli(debug: bool) -> None:
    """Masked Video Distillation at scale."""


for _command in (
    training.pretrain,
    training.finetune,
    training.propose,
    training.pipeline,
    training.quickstart,
    training.draw,
    testing.evaluate,
    testing.predict,
    testing.ensemble,
    testing.report,
    testing.features,
    probe.probe,
    detection.detect,
    data.data,
    weights.import_weights,
    weights.export_weights,
    weights.inspect,
    bench.bench,
    plan.plan,
    profile.profile,
    about.recipes,
    about.schema,
    about.env,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point: user errors are one message and exit code 2; `--debug` adds the traceback."""
    debug = "--debug" in sys.argv
    if debug:
        # Accepted anywhere on the line.
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    configure()
    try:
        cli(prog_name="mvd-scale")
    except (UserError, OSError) as error:
        if debug:
            raise
        _speak_once()
        click.echo(f"mvd-scale: {error}", err=True)
        sys.exit(2)


def _speak_once() -> None:
    """Let rank 0 say an error that all ranks share: its exit makes the launcher end the others before they speak."""
    if launched_rank():
        time.sleep(5)
