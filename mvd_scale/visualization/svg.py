"""Figures of a report as inline SVG, in the colours of the page, which follow the reader's light or dark mode.

Legend: C classes.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mvd_scale.evaluation.metrics import BINS, Predictions

SERIES = tuple(f"#01020{number}" for number in range(8))
"""Placeholder colours of curves, in the order in which they are taken."""

_COLOURS = {
    "#010101": "currentColor",
    "#010102": "var(--right)",
    "#010103": "var(--wrong)",
    "#010104": "var(--faint)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
}
"""Placeholder colours for matplotlib, and the CSS colours of the page that replace them in the SVG."""

INK, RIGHT, WRONG, FAINT = list(_COLOURS)[:4]
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mvd-scale",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}

_CELLS = 120
"""Largest number of cells of a heat map along a side."""

_DIAGONAL, _BESIDE = (66, 133, 200), (224, 108, 48)
"""RGB colours of a heat map's cells of correct and wrong predictions, drawn over the page's background."""


def reliability(predictions: Predictions) -> Markup:
    """Draw the reliability diagram: accuracy (bars) by confidence; perfect calibration is the dashed line."""
    with matplotlib.rc_context(STYLE):
        figure, axis = empty_axis(4.2, 3.3)
        bins = predictions.reliability()
        filled = [(sure, right) for count, sure, right in bins if count]
        places = [(place + 0.5) / BINS for place, (count, _, _) in enumerate(bins) if count]
        axis.bar(places, [right for _, right in filled], width=0.86 / BINS, color=RIGHT)
        axis.scatter(*np.array(filled).reshape(-1, 2).T, s=14, color=INK, zorder=3)
        axis.plot([0, 1], [0, 1], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="highest score of a video", ylabel="share of right predictions")
        return to_svg(figure, "reliability", "Reliability diagram: accuracy by confidence")


def confidences(predictions: Predictions) -> Markup:
    """Draw the histogram of the confidence of correct and of wrong predictions."""
    with matplotlib.rc_context(STYLE):
        figure, axis = empty_axis(4.2, 3.3)
        sure = predictions.scores.max(1)
        right = predictions.decoded & (predictions.predicted == predictions.labels)
        wrong = predictions.decoded & ~right
        axis.hist(
            [sure[right], sure[wrong]],
            bins=np.linspace(0, 1, 21).tolist(),
            stacked=True,
            color=[RIGHT, WRONG],
            rwidth=0.86,
        )
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set(xlim=(0, 1), xlabel="highest score of a video", ylabel="videos")
        return to_svg(figure, "confidences", "Histogram of confidence, right predictions below, wrong ones above")


def heat_map(confusion: NDArray[np.int64]) -> tuple[Markup, int]:
    """Draw the confusion matrix of many classes: labels as rows, predictions as columns.

    Args:
        confusion: number of videos, int64 (C, C).

    Returns:
        the figure, and the number of classes per cell; a cell's strength is the largest share among its classes.
    """
    classes = len(confusion)
    span = -(-classes // _CELLS)
    cells = -(-classes // span)
    shares = np.zeros((cells * span, cells * span))
    shares[:classes, :classes] = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    right, wrong = (
        part.reshape(cells, span, cells, span).max((1, 3))
        for part in (shares * np.eye(len(shares)), shares * (1 - np.eye(len(shares))))
    )
    picture = np.zeros((cells, cells, 4), np.uint8)
    picture[..., :3] = np.where((wrong > right)[..., None], _BESIDE, _DIAGONAL)
    # The square root makes rare confusions visible beside frequent ones.
    picture[..., 3] = np.round(255 * np.sqrt(np.maximum(right, wrong)))
    with matplotlib.rc_context(STYLE):
        figure, axis = empty_axis(5.2, 4.9)
        edge = cells * span - 0.5
        axis.imshow(picture, interpolation="none", extent=(-0.5, edge, edge, -0.5))
        axis.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5), xlabel="predicted class", ylabel="true class")
        return to_svg(figure, "confusion", f"Confusion matrix of {classes} classes"), span


def empty_axis(width: float, height: float) -> tuple[Figure, Any]:
    """Create a figure of a size in inches, with one axis, on the background of the page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axis = figure.add_subplot()
    axis.patch.set_alpha(0)
    return figure, axis


def to_svg(figure: Figure, name: str, title: str) -> Markup:
    """Convert a figure to inline SVG in the colours of the page.

    Args:
        figure: figure that was drawn in `STYLE` with the placeholder colours.
        name: prefix of its ids, unique in the page.
        title: text for readers who do not see it; any characters.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Inline SVG in HTML needs no namespaces; ids must be unique in the page, so they get the figure's name as prefix.
    text = re.sub(r'\s+xmlns(?::xlink)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))
