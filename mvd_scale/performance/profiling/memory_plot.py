"""Plot of the memory of profiled steps over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mvd_scale.performance.profiling.trace import Trace

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")


def plot_memory(trace: Trace, title: str, label: str, out: Path) -> None:
    """Plot memory over time, with the parts of the steps as coloured bands (PNG).

    Args:
        trace: trace of one rank.
        title: title of the plot.
        label: name of the memory, for the axis.
        out: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    names = list(dict.fromkeys(span.name for span in trace.parts))
    colour = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    named: set[str] = set()
    for span in trace.parts:
        # One entry in the legend for all bands of a part.
        label_of_band = None if span.name in named else span.name
        axis.axvspan(1000 * span.start, 1000 * span.end, color=colour[span.name], alpha=0.3, lw=0, label=label_of_band)
        named.add(span.name)
    moments, used = np.array(trace.memory, dtype=float).reshape(-1, 2).T
    axis.plot(1000 * moments, used / 2**30, color="#222222", linewidth=1.1, drawstyle="steps-post")
    if len(used):
        highest = int(used.argmax())
        axis.plot(1000 * moments[highest], used[highest] / 2**30, "o", color="#222222", markersize=4)
        axis.annotate(
            f"{used[highest] / 2**30:.3g} GiB", (1000 * moments[highest], used[highest] / 2**30),
            xytext=(0, 5), textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    for number, step in enumerate(trace.steps, start=1):
        axis.axvline(1000 * step.end, color="#222222", linewidth=0.7, linestyle=(0, (3, 3)))
        axis.text(
            500 * (step.start + step.end), 1.01, f"step {number}", transform=axis.get_xaxis_transform(),
            ha="center", va="bottom", fontsize=8,
        )  # fmt: skip
    axis.set_xlim(0, 1000 * max(span.end for span in (*trace.steps, *trace.parts)))
    axis.set_ylim(0, axis.get_ylim()[1] * 1.06)
    axis.set(xlabel="ms", ylabel=f"GiB, {label}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=110)
