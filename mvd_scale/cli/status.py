"""Commands that read the folders of runs: `status` on the terminal, `report` as a page to send."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mvd_scale.run_status import RunStatus

_PATH_WIDTH = 24
"""Letters of a path beside the figures of its run, at least."""


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch one line for each look.")
@click.option("--watch", type=click.FloatRange(min=1), metavar="SECONDS", help="Look again every SECONDS until Ctrl-C.")
def status(runs: tuple[Path, ...], as_json: bool, watch: float | None) -> None:
    """Show whether RUNS are alive, their step, speed, ETA, loss, last checkpoint, faults, hosts and quarantined videos.

    RUNS are folders of runs, or folders that hold runs up to four levels below, such as that of a pipeline. Only files
    are read, so that it works from any host that sees the folders. The exit code is 2 if one of RUNS is no run.
    """
    import json
    import sys
    import time

    from rich.console import Console
    from rich.live import Live

    from mvd_scale.errors import UserError
    from mvd_scale.run_status import find_runs, read_statuses

    def look() -> tuple[list[RunStatus], list[str]]:
        found: dict[Path, Path] = {}
        errors = []
        for path in runs:
            try:
                # Links may lead to one run by several paths: the first one is shown.
                found = {run.resolve(): run for run in reversed(find_runs(path))} | found
            except (UserError, OSError) as error:
                errors.append(str(error))
        return read_statuses(sorted(found.values())), errors

    def show(indent: int | None) -> list[str]:
        statuses, errors = look()
        if as_json:
            document = {"runs": [run.to_json() for run in statuses], "errors": errors}
            click.echo(json.dumps(document, indent=indent))
        else:
            if statuses:
                console.print(render(statuses), crop=False)
            for error in errors:
                click.echo(f"mvd-scale: {error}", err=True)
        return errors

    console = Console()
    if watch is None:
        if show(indent=2):
            sys.exit(2)
        return
    try:
        if as_json or not console.is_terminal:
            while True:
                show(indent=None)
                time.sleep(watch)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                statuses, errors = look()
                live.update(render(statuses, errors), refresh=True)
                time.sleep(watch)
    except KeyboardInterrupt:
        return


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER...")
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Page to write; report.html in FOLDER if omitted, and in the current folder for several.",
)  # fmt: skip
@click.option(
    "--hardest", type=click.IntRange(min=0), default=8, show_default=True,
    help="Number of hardest videos of each kind, on the page of a test.",
)  # fmt: skip
def report(folders: tuple[Path, ...], out: Path | None, hardest: int) -> None:
    """Write one HTML page of a test, or of runs and studies, which is read without network.

    A folder that `evaluate`, `ensemble` or `probe` wrote gives the page of that test: figures, classes, and pictures of
    the hardest videos. Runs, folders up to four levels above runs, and studies give a page with state, results, curves,
    predictions over time, and differences of settings, of all FOLDERS together. What is no run, test or study, or a
    damaged result, is named, and the exit code is then 2.
    """
    import sys

    from mvd_scale.run_report.page import write_run_report
    from mvd_scale.visualization.html_report import write_report

    if out is None:
        out = (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if len(folders) == 1 and (folders[0] / "scores.parquet").is_file():
        write_report(folders[0], out, hardest=hardest)
        click.echo(out)
        return
    left_out = write_run_report(folders, out)
    click.echo(out)
    for sentence in left_out:
        click.echo(f"mvd-scale: {sentence}", err=True)
    if left_out:
        sys.exit(2)


def render(statuses: list[RunStatus], errors: Sequence[str] = ()) -> RenderableType:
    """Make a table of runs, and lines for what does not fit in it, and for errors."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = [_cells(run) for run in statuses]
    table = Table(box=None, pad_edge=False, header_style="bold")
    # A column that no run has anything in is left out: terminals are narrow.
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    for name in columns:
        # Wider than the terminal is better than without figures: only paths are folded.
        widest = max(len(name), *(len(row[name]) for row in rows))
        least = min(widest, _PATH_WIDTH) if name == "run" else widest
        table.add_column(
            name, overflow="fold", min_width=least, justify="left" if name in ("run", "state") else "right"
        )
    for row in rows:
        table.add_row(*(Text(_plain(row[name])) for name in columns))
    lines = [Text(_plain(line)) for run in statuses for line in _lines(run)]
    lines += [Text(_plain(f"error: {error}")) for error in errors]
    return Group(table, *lines)


def _cells(run: RunStatus) -> dict[str, str]:
    from mvd_scale.training.metrics.terminal import format_duration

    total = "" if run.total_steps is None else f"/{run.total_steps}"
    checkpoint, hosts = run.checkpoint, len(run.hosts)
    return {
        "run": str(run.path),
        "state": run.state,
        "step": f"{run.step}{total}",
        "loss": "" if run.loss is None else f"{run.loss:.4f}",
        "clips/s": "" if run.clips_per_second is None else f"{run.clips_per_second:.1f}",
        "ETA": "" if run.eta_seconds is None else format_duration(run.eta_seconds),
        "checkpoint": "none" if checkpoint is None else str(checkpoint.step),
        "its age": "" if checkpoint is None else format_duration(checkpoint.age_seconds),
        "ranks": str(run.ranks or ""),
        "hosts": str(hosts) if hosts > 1 else "",
        "faults": str(run.faults or ""),
        "restarts": str(run.restarts or ""),
        "quarantine": str(run.quarantined or ""),
    }


def _lines(run: RunStatus) -> list[str]:
    lines = [f"{run.path}: {run.state}: {run.note}"] if run.note else []
    if run.last_fault is not None and run.last_fault.message != run.note:
        lines.append(f"{run.path}: last fault, {run.last_fault.time}: {run.last_fault.message}")
    if len(run.hosts) > 1:
        lines.append(f"{run.path}: hosts: " + ", ".join(f"{host} ({ranks})" for host, ranks in run.hosts.items()))
    return lines


def _plain(text: str) -> str:
    """Text without characters that steer the terminal, which names of files and hosts may hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
