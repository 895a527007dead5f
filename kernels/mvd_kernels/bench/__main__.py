"""`python -m mvd_kernels.bench [OPERATOR]... [--csv FILE]`: times of the operators by kernel and by reference."""

from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path

import click
import torch

from mvd_kernels.bench.timing import machine, time_case

OPERATORS = (
    "attention", "tube_rows", "tube_targets", "masked_distance", "add_layer_norm", "decoder_input", "quantize",
)  # fmt: skip


@click.command()
@click.argument("operators", nargs=-1, type=click.Choice(OPERATORS))
@click.option(
    "--csv",
    "file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write the table to this CSV file, with device and versions.",
)
def main(operators: tuple[str, ...], file: Path | None) -> None:
    """Time every implementation of the named operators (default: all) on the GPU, or on the CPU if there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    click.echo(machine(device)["device"] + ("" if device.type == "cuda" else ": Triton kernels need a GPU"))
    click.echo(f"{'operator':<18}{'shape':<38}{'way':<14}{'pass':<10}{'20 %':>9}{'50 %':>9}{'80 %':>9} ms  MiB")
    lines = []
    for operator in operators or OPERATORS:
        for case in import_module(f"mvd_kernels.bench.{operator}").cases(device):
            for timing in time_case(case, device):
                low, median, high = (f"{value:.3f}" for value in timing.milliseconds)
                peak = "" if timing.peak is None else f"{timing.peak / 2**20:.1f}"
                head = f"{operator:<18}{case.shape:<38}{timing.way:<14}{timing.passes:<10}"
                click.echo(f"{head}{low:>9}{median:>9}{high:>9}  {peak:>7}")
                line = {"operator": operator, "shape": case.shape, "dtype": str(case.dtype), "way": timing.way}
                times = {"ms_20": low, "ms_50": median, "ms_80": high, "peak_mib": peak}
                lines.append({**line, "pass": timing.passes, **times, **machine(device)})
    if file is not None:
        with file.open("w", newline="") as table:
            writer = csv.DictWriter(table, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
