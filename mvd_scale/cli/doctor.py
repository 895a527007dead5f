"""Command `doctor`: checks of one node or of all hosts of a job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from mvd_scale.cli.options import WITH_OVERRIDES, overrides_argument
from mvd_scale.config.launcher import launched_rank
from mvd_scale.errors import UserError

if TYPE_CHECKING:
    from mvd_scale.doctor.findings import Group

_COLOURS = {"ok": "green", "warning": "yellow", "fail": "red", "left out": "white"}

_GROUPS = ("hosts", "versions", "machine", "gpus", "network", "folder", "decoding")


@click.command(context_settings=WITH_OVERRIDES)
@click.option(
    "--hostfile", type=click.Path(path_type=Path),
    help="Check all hosts of this file, `HOST slots=N` a line: starts them as launch/multi_node.sh does. Under a "
    "launcher it only tells the names of the hosts.",
)  # fmt: skip
@click.option("--recipe", help="Recipe whose checkpoints must find room, and whose files must be on every host.")
@click.option(
    "--folder", type=click.Path(path_type=Path),
    help="Folder that all hosts share; run.folder of the recipe if omitted, or else the current folder.",
)  # fmt: skip
@click.option(
    "--only", type=click.Choice(_GROUPS), multiple=True, help="Make the checks of this group only; repeatable."
)
@click.option(
    "--rounds", type=click.IntRange(min=0), default=32, show_default=True,
    help="Most rounds in which pairs of hosts measure their link; all pairs of N hosts take N - 1. 0 for none.",
)  # fmt: skip
@click.option("--between", default="", metavar="HOST,HOST,..", help="Measure only the pairs of these hosts.")
@click.option(
    "--wait", type=click.FloatRange(min=1), default=60, show_default=True,
    help="Seconds that ranks wait for each other at the start.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@overrides_argument
def doctor(
    hostfile: Path | None,
    recipe: str | None,
    folder: Path | None,
    only: tuple[str, ...],
    rounds: int,
    between: str,
    wait: float,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Check this node, or all hosts of a job, before a run: versions, GPUs, links, shared folder, clocks, limits.

    Under a launcher it checks the hosts of that launcher. Exit code 1 if a check failed.

    OVERRIDES are dotted keys of the recipe, such as --run.folder /shared/runs/a
    """
    from mvd_scale.distributed.hostfile import read_hostfile
    from mvd_scale.doctor.findings import GROUPS
    from mvd_scale.doctor.runner import examine, leave
    from mvd_scale.doctor.settings import Settings
    from mvd_scale.performance.planning.plan import load

    if overrides and recipe is None:
        raise UserError(f"unexpected argument {overrides[0]}: keys of a recipe need --recipe")
    planned = None if recipe is None else load(recipe, list(overrides))
    settings = Settings(
        folder=folder or (Path() if planned is None else planned.run.folder),
        recipe=planned,
        groups=frozenset(cast("tuple[Group, ...]", only) or GROUPS),
        rounds=rounds,
        between=tuple(filter(None, between.split(","))),
        wait=wait,
        # The hosts that a launcher has started need not have the file: it is for names alone.
        hosts=read_hostfile(str(hostfile)) if hostfile and (hostfile.exists() or launched_rank() is None) else {},
    )
    words = _words(folder=folder, recipe=recipe, only=only, rounds=rounds, between=between, wait=wait)
    report = examine(settings, [*words, *overrides])
    if report is None:
        leave(0)
    else:
        click.echo(report.to_json() if as_json else report.to_text(_paint))
        leave(1 if report.outcome == "fail" else 0)


def _words(**options: Any) -> list[str]:
    """Options of this command, as words."""
    words: list[str] = []
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [] if one in (None, "") else [f"--{name}", str(one)]
    return words


def _paint(text: str, outcome: str) -> str:
    return click.style(text, fg=_COLOURS[outcome])
