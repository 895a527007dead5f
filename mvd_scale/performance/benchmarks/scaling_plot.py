"""Plot of the measured growth of a step's cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mvd_scale.performance.benchmarks.scaling import UNITS, GrowthReport, PowerLaw, Quantity

_STYLES: dict[Quantity, tuple[str, str]] = {
    "tokens": ("#4c78a8", "o"),
    "frames": ("#f58518", "s"),
    "batch": ("#54a24b", "^"),
    "depth": ("#b279a2", "D"),
}
"""Colour and marker of each quantity."""


def plot_growth(report: GrowthReport, out: Path) -> None:
    """Plot time and memory over each quantity, relative to the recipe's value, on logarithmic axes (PNG).

    Args:
        report: the measurement.
        out: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = time, memory = figure.subplots(1, 2)
    _draw(time, report, {quantity: report.time(quantity) for quantity in report.points}, "seconds")
    _draw(memory, report, {quantity: report.memory(quantity) for quantity in report.points}, "gib")
    time.set(title="time of a step", ylabel="s")
    memory.set(title="peak memory of a rank", ylabel="GiB")
    # Both plots span the same number of octaves, so that their slopes are comparable; 1.2 leave room for the legend.
    octaves = 1.2 + max(math.log2(axis.dataLim.ymax / axis.dataLim.ymin) for axis in axes)
    for axis in axes:
        middle = math.sqrt(axis.dataLim.ymin * axis.dataLim.ymax)
        axis.set_ylim(middle * 2 ** (-octaves / 2), middle * 2 ** (octaves / 2))
    figure.suptitle(f"{report.title()}\n{report.machine.title()}", fontsize=9)
    figure.savefig(out, dpi=110)


def _draw(axis: Any, report: GrowthReport, powers: dict[Quantity, PowerLaw], cost: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for quantity, points in report.points.items():
        base, power, (colour, mark) = report.base[quantity], powers[quantity], _STYLES[quantity]
        counts = [point.count for point in points]
        axis.plot(
            [count / base for count in counts], [getattr(point, cost) for point in points],
            mark, color=colour, markersize=7, markeredgecolor="white", markeredgewidth=0.8,
        )  # fmt: skip
        axis.plot([count / base for count in counts], [power.at(count) for count in counts], color=colour, lw=1.4)
        label = f"{UNITS[quantity]} ({base}):  $n^{{\\,{power.power:.2f}}}$"
        axis.plot([], [], mark, linestyle="-", color=colour, lw=1.4, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(base=2))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("n relative to the recipe's value (in brackets)")
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", frameon=False, fontsize=9)
