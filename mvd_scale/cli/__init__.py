"""Command line `mvd-scale`: one short function per subcommand, grouped in files by topic."""

from __future__ import annotations

import atexit
import gc
import sys
import time
import traceback

import click

from mvd_scale import __version__
from mvd_scale.cli import (
    about,
    analyze,
    bench,
    data,
    detection,
    doctor,
    plan,
    probe,
    profile,
    status,
    supervise,
    testing,
    training,
    weights,
)
from mvd_scale.config.launcher import env_rank
from mvd_scale.errors import FAULT_CODE, UserError, is_device_fault
from mvd_scale.utils.logging import configure_logging


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mvd-scale")
@click.option("--debug", is_flag=True, help="Print the traceback of errors.")
def cli(debug: bool) -> None:
    """Masked Video Distillation at scale: train, distil, fine-tune and evaluate video encoders."""


for _command in (
    training.pretrain,
    training.finetune,
    training.propose,
    training.pipeline,
    training.quickstart,
    training.reproduce,
    training.draw,
    supervise.supervise,
    testing.evaluate,
    testing.predict,
    testing.ensemble,
    testing.features,
    probe.probe,
    analyze.analyze,
    detection.detect,
    data.data,
    weights.import_weights,
    weights.export_weights,
    weights.inspect,
    bench.bench,
    plan.plan,
    plan.tables,
    profile.profile,
    status.status,
    status.report,
    about.recipes,
    about.schema,
    about.env,
    doctor.doctor,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line. A `UserError` prints one message and exits with code 2; `--debug` prints the traceback.

    The failure of a GPU prints its traceback and exits with `FAULT_CODE`.
    """
    debug = "--debug" in sys.argv
    if debug:
        # click accepts options of a group before the subcommand only; --debug may stand anywhere.
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    configure_logging()
    _collect_garbage_rarely()
    try:
        cli(prog_name="mvd-scale")
    except (UserError, OSError) as error:
        if debug:
            raise
        if not getattr(error, "reported", False):
            _delay_message_of_other_ranks()
            click.echo(f"mvd-scale: {error}", err=True)
        sys.exit(getattr(error, "exit_code", UserError.exit_code))
    except RuntimeError as error:
        if not is_device_fault(error):
            raise
        traceback.print_exc()
        sys.exit(FAULT_CODE)


def _collect_garbage_rarely() -> None:
    """Let the collector of cycles run rarely until the ranks connect, and not at the end.

    It would pass again and again over the objects that the imports of torch and DeepSpeed make: 2.5 of the 6 seconds
    that a process takes for its start and its end. `init_distributed` restores the usual intervals.
    """
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)


def _delay_message_of_other_ranks() -> None:
    """Delay the message on all ranks but 0: the exit of rank 0 makes the launcher end them before they print it too."""
    if env_rank():
        time.sleep(5)
