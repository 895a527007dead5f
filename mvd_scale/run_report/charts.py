"""Curves of runs over optimizer steps, as inline SVG with a table of their figures.

Legend: R readings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mvd_scale.run_report.records import RunRecord, Series
from mvd_scale.visualization.svg import FAINT, SERIES, STYLE, empty_axis, to_svg

DASHES = ("solid", "dashed", "dotted")
"""Line styles, of matplotlib and of CSS: the first for the first eight runs, and so on."""

_BINS = 300
"""Largest number of points of a curve; of more readings it is the mean in as many ranges of steps, in their extent."""

_FEW = 12
"""Largest number of readings that are marked by dots."""

_DESCRIBED = 8
"""Number of runs whose ends are part of the description of a chart."""

_LOG_RATIO = 30.0
"""Ratio of the largest to the smallest positive value from which the axis is logarithmic."""


@dataclass(frozen=True)
class Quantity:
    """Metric of a chart, with its title and unit."""

    metric: str
    title: str
    unit: str = ""
    scale: float = 1.0
    """Factor from the metric to the unit."""
    from_zero: bool = False
    """Whether the axis begins at zero."""


@dataclass(frozen=True)
class Line:
    """Run in a chart: place in the list of all runs, which gives its colour, and its figures as text."""

    place: int
    name: str
    readings: int
    figures: tuple[str, str, str, str]
    """First, lowest, highest and last finite value; empty without any."""


@dataclass(frozen=True)
class Chart:
    """Figure with its table."""

    title: str
    unit: str
    picture: Markup
    lines: list[Line]
    logarithmic: bool
    averaged: bool
    """Whether a curve is the mean of several readings."""
    without: list[str]
    """Names of the runs that have no such metric."""


_OPTIMIZER = (
    Quantity("lr", "Learning rate"),
    Quantity("grad_norm", "Gradient norm before clipping"),
    Quantity("loss_scale", "Loss scale"),
    Quantity("skipped_steps", "Skipped steps since the start of the processes"),
)
_MACHINE = (
    Quantity("clips_per_second", "Throughput", "clips/s", from_zero=True),
    Quantity("data_wait_share", "Time that the slowest rank waits for data", "%", 100.0, from_zero=True),
    Quantity("memory_gib", "Peak memory of the largest rank", "GiB", from_zero=True),
    Quantity("clips_replaced", "Clips replaced since the start of the processes"),
)
_EVENTFUL = frozenset({"loss_scale", "skipped_steps", "clips_replaced"})
"""Metrics that are shown only if they change."""


def loss_charts(records: Sequence[RunRecord], kind: str) -> list[Chart]:
    """Draw the loss, and then its part for each target, of the runs of one kind."""
    chosen = [record for record in records if record.kind == kind]
    names = dict.fromkeys(name for record in chosen for name in record.series)
    targets = {key.split(".")[1] for record in chosen for key in record.settings if key.startswith("targets.")}
    parts = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
    quantities = [
        Quantity("loss", "Loss"),
        *(Quantity(f"loss/{part}", f"Loss of {part}" if part in targets else part.capitalize()) for part in parts),
    ]
    return _draw_all(quantities, records, f"loss-{kind}", lambda record: record.kind == kind)


def optimizer_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Draw learning rate and gradient norm, and what is unusual."""
    return _draw_all(_OPTIMIZER, records, "optimizer", lambda record: True)


def machine_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Draw throughput, data wait and memory; of several students of one run, those of the run."""
    paths = {record.status.path for record in records}
    return _draw_all(_MACHINE, records, "machine", lambda record: record.parent not in paths)


def judged_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Draw what validation and probe measured, in percent."""
    names = dict.fromkeys(name for record in records for name in record.judged)
    quantities = [Quantity(name, name.capitalize(), "%", 100.0) for name in names]
    return _draw_all(quantities, records, "judged", lambda record: True, lambda record: record.judged)


def _draw_all(
    quantities: Sequence[Quantity],
    records: Sequence[RunRecord],
    prefix: str,
    shown: Callable[[RunRecord], bool],
    series_of: Callable[[RunRecord], dict[str, Series]] = lambda record: record.series,
) -> list[Chart]:
    charts = []
    for number, quantity in enumerate(quantities):
        held = {place: series_of(record).get(quantity.metric) for place, record in enumerate(records) if shown(record)}
        curves = {place: series for place, series in held.items() if series is not None}
        if not curves or (quantity.metric in _EVENTFUL and not any(_changes(each) for each in curves.values())):
            continue
        # Runs without any reading are named elsewhere.
        without = [records[place].name for place in held if place not in curves and series_of(records[place])]
        charts.append(_draw(quantity, curves, records, without, f"{prefix}-{number}".replace(" ", "-")))
    return charts


def _changes(series: Series) -> bool:
    return bool(len(np.unique(series.values[np.isfinite(series.values)])) > 1)


def _draw(
    quantity: Quantity, curves: dict[int, Series], records: Sequence[RunRecord], without: list[str], name: str
) -> Chart:
    scaled = {place: Series(each.steps, each.values * quantity.scale) for place, each in curves.items()}
    finite = np.concatenate([each.values[np.isfinite(each.values)] for each in scaled.values()])
    wide = len(finite) and finite.min() > 0 and finite.max() > _LOG_RATIO * finite.min()
    logarithmic = bool(wide) and not quantity.from_zero
    lines = [Line(place, records[place].name, len(each.steps), _figures(each.values)) for place, each in scaled.items()]
    picture = _picture(quantity, scaled, name, _summary(quantity, lines), logarithmic=logarithmic)
    averaged = any(len(each.steps) > _BINS for each in scaled.values())
    return Chart(quantity.title, quantity.unit, picture, lines, logarithmic, averaged, without)


def _summary(quantity: Quantity, lines: list[Line]) -> str:
    """Describe a chart for readers who do not see it."""
    ends = "; ".join(f"{line.name}: {line.figures[0]} to {line.figures[3]}" for line in lines[:_DESCRIBED])
    unit = f" in {quantity.unit}" if quantity.unit else ""
    return f"{quantity.title}{unit} over optimizer steps. {ends}"


def _picture(quantity: Quantity, curves: dict[int, Series], name: str, title: str, *, logarithmic: bool) -> Markup:
    last = max(int(each.steps[-1]) for each in curves.values())
    with matplotlib.rc_context(STYLE):
        figure, axis = empty_axis(4.6, 2.7)
        for place, each in curves.items():
            _draw_curve(axis, each, SERIES[place % len(SERIES)], DASHES[place // len(SERIES) % len(DASHES)])
        axis.set(xlabel="optimizer steps", ylabel=quantity.unit, xlim=(0, 1.02 * max(last, 1)))
        if logarithmic:
            axis.set_yscale("log")
        elif quantity.from_zero:
            axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y", color=FAINT, linewidth=0.4)
        return to_svg(figure, name, title)


def _draw_curve(axis: Any, series: Series, colour: str, dash: str) -> None:
    steps, mean, low, high = in_bins(series)
    style = {"color": colour, "linewidth": 1.5, "linestyle": dash}
    axis.plot(steps, mean, marker="o" if len(steps) <= _FEW else "", markersize=3, **style)
    if len(series.steps) > _BINS:
        axis.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)


def in_bins(
    series: Series,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Reduce a metric to as many points as a chart shows.

    Returns:
        steps, and mean, smallest and largest value of the finite readings, (points,) each; NaN without any.
    """
    if len(series.steps) <= _BINS:
        return series.steps.astype(np.float64), series.values, series.values, series.values
    edges = np.linspace(series.steps[0], series.steps[-1] + 1, _BINS + 1)
    starts = np.unique(np.searchsorted(series.steps, edges[:-1]))
    parts = [part[np.isfinite(part)] for part in np.split(series.values, starts[1:])]
    columns = [(part.mean(), part.min(), part.max()) if len(part) else (np.nan,) * 3 for part in parts]
    mean, low, high = np.array(columns).T
    steps = np.array([part.mean() for part in np.split(series.steps.astype(np.float64), starts[1:])])
    return steps, mean, low, high


def _figures(values: NDArray[np.float64]) -> tuple[str, str, str, str]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "", "", "", ""
    first, lowest, highest, last = (f"{value:.4g}" for value in (finite[0], finite.min(), finite.max(), finite[-1]))
    return first, lowest, highest, last
