"""Plot of similarity matrices side by side (Figure 3)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mvd_scale.analysis.similarity import Similarity, SimilarityMatrix

INK = "#757575"
"""Grey of text and lines, with a contrast of 4.5 both on white and on black pages: backgrounds are transparent."""

_CELL, _LEAST = 0.36, 2.4
"""Side of a cell, and least side of a matrix, in inches."""

_LETTERS = 12
"""Letters of a title per inch."""

_COLUMNS = 4
"""Matrices in a row."""

_WRITTEN = 10
"""Largest number of slices at which values are written into the cells."""


def plot_similarity(similarity: Similarity, out: Path) -> None:
    """Plot the matrices of all models on one scale of colours, from the smallest value to 1 (PNG).

    Args:
        similarity: the matrices.
        out: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = similarity.models
    slices = len(models[0].matrix)
    side = max(_CELL * slices, _LEAST)
    columns = min(len(models), _COLUMNS)
    rows = math.ceil(len(models) / columns)
    figure = Figure(figsize=((side + 0.75) * columns + 0.9, (side + 0.85) * rows + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    # In steps of 0.05, so that the scale has round ends.
    lowest = min(math.floor(20 * min(map(min, model.matrix))) / 20 for model in models)
    image: Any = None
    for axis, model in zip(axes, models, strict=False):
        image = _draw(axis, model, lowest, side)
    for axis in axes[len(models) :]:
        axis.axis("off")
    bar = figure.colorbar(image, ax=axes.tolist(), fraction=0.05, pad=0.02, aspect=18)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    bar.set_label("cosine similarity", color=INK, fontsize=9)
    figure.suptitle(_title(similarity), fontsize=9, color=INK)
    figure.savefig(out, dpi=150, transparent=True)


def _title(similarity: Similarity) -> str:
    settings = similarity.settings
    views = settings["views"]
    sampling = f"stride {views['stride']}" if views["sampling"] == "dense" else "spread over each video"
    return (
        "cosine of the features of two time slices at the same place\n"
        f"mean of {similarity.clips} clips of {settings['frames']} frames, {sampling}"
    )


def _draw(axis: Any, model: SimilarityMatrix, lowest: float, side: float) -> Any:
    values = np.array(model.matrix)
    slices = len(values)
    image = axis.imshow(values, cmap="viridis", vmin=min(lowest, 0.95), vmax=1, interpolation="none")
    axis.set_title(_shortened(model.name, int(_LETTERS * side)), fontsize=10, color=INK)
    marks = range(0, slices, max(1, slices // 8))
    axis.set_xticks(marks, [mark + 1 for mark in marks])
    axis.set_yticks(marks, [mark + 1 for mark in marks])
    axis.tick_params(colors=INK, labelsize=8, length=0)
    axis.set_xlabel("time slice", color=INK, fontsize=9)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if slices <= _WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.42
            axis.text(
                column, row, _short(value), ha="center", va="center", fontsize=6.5, color="white" if dark else "black"
            )
    return image


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _short(value: float) -> str:
    """Two digits without the leading zero, such as `.87`."""
    return f"{value:.2f}".replace("0.", ".", 1)
