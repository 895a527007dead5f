"""Command `mvd-scale supervise`: a training command that comes back after faults."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvd_scale.cli import detection, training
from mvd_scale.errors import UserError

if TYPE_CHECKING:
    from mvd_scale.config import RunRecipe

_seconds = click.FloatRange(min=0, min_open=True)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--hostfile", type=click.Path(path_type=Path),
    help="File of the hosts and the largest number of ranks on each; this host alone if omitted.",
)  # fmt: skip
@click.option(
    "--host", help="Name of this host in the hostfile, if several names there are addresses of this host."
)  # fmt: skip
@click.option(
    "--ranks", type=click.IntRange(min=1),
    help="Largest number of ranks of this host, in place of the hostfile; one for each GPU, or 2 on CPUs, if omitted.",
)  # fmt: skip
@click.option(
    "--min-hosts", type=click.IntRange(min=1), default=1, show_default=True,
    help="Smallest number of hosts that go on without the others.",
)  # fmt: skip
@click.option(
    "--join-seconds", type=click.FloatRange(min=0), default=60.0, show_default=True,
    help="Time for missing hosts to come, before a start without them and before a restart with those that came later.",
)  # fmt: skip
@click.option(
    "--wait-minutes", type=_seconds, default=60.0, show_default=True,
    help="Time after which the job ends with exit code 75 because fewer than --min-hosts are there.",
)  # fmt: skip
@click.option(
    "--max-restarts", type=click.IntRange(min=0), default=10, show_default=True,
    help="Largest number of restarts after failures within a period.",
)  # fmt: skip
@click.option(
    "--max-errors", type=click.IntRange(min=0), default=2, show_default=True,
    help="Largest number of restarts within a period after exit code 1, a traceback.",
)  # fmt: skip
@click.option("--period-hours", type=_seconds, default=24.0, show_default=True, help="Length of a period.")
@click.option(
    "--backoff-seconds", type=click.FloatRange(min=0), default=5.0, show_default=True,
    help="Wait before the first restart; each further one waits twice as long, up to 5 minutes.",
)  # fmt: skip
@click.option(
    "--dead-seconds", type=click.FloatRange(min=3), default=15.0, show_default=True,
    help="Silence after which a host counts as lost. A host whose supervisor has ended is noticed at once.",
)  # fmt: skip
@click.option(
    "--port", type=click.IntRange(1, 65535), default=29400, show_default=True,
    help="Port where supervisors meet, the same on all hosts; unused on one host.",
)  # fmt: skip
@click.option(
    "--master-port", type=click.IntRange(0, 65535), default=0,
    help="Port where ranks meet; any that is free if omitted.",
)  # fmt: skip
@click.argument("words", metavar="SUBCOMMAND [ARGUMENTS]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def supervise(context: click.Context, /, words: tuple[str, ...], **options: Any) -> None:
    """Run the ranks of SUBCOMMAND on this host, and restart them after faults, with the hosts that are left.

    SUBCOMMAND is pretrain, finetune or detect train. Start the same command on every host of the hostfile. It ends when
    the run is finished, with exit code 2 after invalid input, and with 128 + the signal when it was asked to stop;
    after other failures the run resumes from its last checkpoint. Hosts that come later, or again, are taken in. The
    global batch stays: of hosts or ranks that it cannot be split over, some wait as spares.
    """
    from mvd_scale.elastic.command import SupervisedCommand
    from mvd_scale.elastic.coordinator import Membership
    from mvd_scale.elastic.meeting import find_site
    from mvd_scale.elastic.policy import Limits
    from mvd_scale.elastic.supervisor import SupervisedJob, Supervisor

    if options["host"] is not None and options["hostfile"] is None:
        raise UserError(
            f"--host is {options['host']}, but there is no hostfile: give `--hostfile`, or leave out `--host`"
        )
    slots = _slots(options["hostfile"], options["ranks"])
    site = find_site(list(slots), options["host"], options["port"])
    if options["min_hosts"] > len(slots):
        raise UserError(f"--min-hosts is {options['min_hosts']}, but there are {len(slots)} hosts")
    debug = ["--debug"] if context.find_root().params["debug"] else []
    command = SupervisedCommand((*debug, *words), _recipe(words))
    waits = {"join_seconds": options["join_seconds"], "wait_seconds": 60 * options["wait_minutes"]}
    job = SupervisedJob(
        command=command.command,
        digest=command.digest(site.hosts),
        hooks=command,
        membership=Membership(site.hosts, options["min_hosts"], **waits),
        limits=Limits(
            restarts=options["max_restarts"],
            errors=options["max_errors"],
            period=3600 * options["period_hours"],
            backoff=options["backoff_seconds"],
        ),
        dead_seconds=options["dead_seconds"],
        master_port=options["master_port"],
    )
    sys.exit(Supervisor(job, site, list(slots.values())[site.index]).run())


def _slots(hostfile: Path | None, ranks: int | None) -> dict[str, int]:
    """Largest number of ranks of each host."""
    from mvd_scale.distributed.hostfile import read_hostfile

    if hostfile is not None and ranks is not None:
        raise UserError("--hostfile and --ranks exclude each other: the hostfile gives the ranks of each host")
    if hostfile is not None:
        return read_hostfile(str(hostfile))
    return {"localhost": ranks or _usual_ranks()}


def _usual_ranks() -> int:
    from mvd_scale.distributed.process_group import choose_device

    if choose_device("auto").type == "cpu":
        return 2
    import torch

    return torch.cuda.device_count()


def _recipe(words: tuple[str, ...]) -> RunRecipe:
    """Recipe of a command that trains.

    Raises:
        UserError: the command does not train, or its recipe is invalid.
    """
    from mvd_scale.config import load_detection_recipe, load_finetune_recipe, load_recipe

    loaders: dict[tuple[str, ...], tuple[click.Command, Callable[[str, list[str]], RunRecipe]]] = {
        ("pretrain",): (training.pretrain, load_recipe),
        ("finetune",): (training.finetune, load_finetune_recipe),
        ("detect", "train"): (detection.train, load_detection_recipe),
    }
    for name, (command, load) in loaders.items():
        if words[: len(name)] == name:
            given = command.make_context(" ".join(name), list(words[len(name) :])).params
            return load(given["recipe"], list(given["overrides"]))
    raise UserError(
        f"supervise cannot restart {' '.join(words[:2])!r}: expected {', '.join(' '.join(name) for name in loaders)}, "
        "which resume"
    )
