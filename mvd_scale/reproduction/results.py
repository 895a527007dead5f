"""Results of a table: figures of all seeds, their means with intervals, the directions of the paper; `results.json`.

`results.json` is of the table that was asked for last. It is written at the start and after each stage, so that a study
that goes on, or was killed, has what is there.
It holds the fields of `TableResults` by name; shares and differences are in percent. `docs/study.md` describes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from mvd_scale.config.pipeline import Pipeline
from mvd_scale.config.reproduction import Comparison, Direction, Scale, ScaledTable
from mvd_scale.pipelines.runner import stage_output
from mvd_scale.reproduction.expand import Cell, Expansion, Measure, Split
from mvd_scale.reproduction.records import Record
from mvd_scale.reproduction.statistics import Interval, interval
from mvd_scale.utils.io import write_atomic

FILE = "results.json"
SCHEMA = 1
"""Number of the form of `results.json`; it rises when fields change their meaning."""

Verdict = Literal["holds", "does not hold", "cannot be told"]


@dataclass(frozen=True)
class SeedFigure:
    """Figure of one seed and where it comes from."""

    seed: int

    top1: float
    """Share of test videos named right, percent."""

    videos: int
    """Number of test videos."""

    config_hash: str
    """Hash of the configurations of test, classifier, encoder, teachers and videos."""

    commit: str
    """Commit of the code that made it."""

    source: str
    """File of the figures of the test, relative to the folder of the results."""


@dataclass(frozen=True)
class CellResult:
    """A cell of the table: an encoder on a task by a measure."""

    row: str
    encoder: str
    task: str
    measure: Measure

    seeds: tuple[SeedFigure, ...]
    """Figures of the seeds that are there."""

    top1: Interval | None
    """Mean over seeds and its 95 % interval, percent; None without any seed."""

    published: float | None
    """Figure of the paper for this cell, percent; None if it has none."""

    missing: dict[int, str]
    """Seeds without a figure, each with the reason."""

    cpu_minutes: float | None
    """Minutes on CPUs for one seed, mean: fine-tuning and test, or probe; None without any, or on a cluster."""


@dataclass(frozen=True)
class ComparisonResult:
    """Paired difference of two encoders on a task, over the seeds that have both."""

    better: str
    than: str
    task: str
    measure: Measure

    differences: dict[int, float]
    """Difference of each seed in percent points."""

    difference: Interval | None
    """Mean difference and its 95 % interval by Student's t over seeds; None without a common seed."""

    verdict: Verdict


@dataclass(frozen=True)
class DirectionResult:
    """A direction of the paper by one measure."""

    says: str
    measure: Measure
    comparisons: tuple[ComparisonResult, ...]
    verdict: Verdict


@dataclass(frozen=True)
class EncoderCost:
    """Minutes on CPUs for the training of one encoder, teacher or student, without that of its teachers."""

    encoder: str

    seeds: int
    """Number of seeds that have been trained."""

    cpu_minutes: float | None
    """Mean over these; None without any, or on a cluster."""


@dataclass(frozen=True)
class TableResults:
    """All that `results.json` holds."""

    table: str
    title: str
    note: str
    scale: str
    split: Split
    seeds: tuple[int, ...]
    cells: tuple[CellResult, ...]

    directions: tuple[DirectionResult, ...]
    """For each direction, one for each measure that all of its encoders and tasks have."""

    encoders: tuple[EncoderCost, ...]

    cpu_minutes: float
    """Minutes on CPUs for all stages that ran here, those that draw videos with them."""

    def write(self, output: Path) -> Path:
        """Write `results.json`, in place of that of another table of the same folder, and return its path."""
        file = output / FILE
        write_atomic(file, json.dumps({"schema": SCHEMA, **_plain(asdict(self))}, indent=2) + "\n")
        return file

    def cell(self, encoder: str, task: str, measure: Measure) -> CellResult:
        """Cell of an encoder on a task."""
        wanted = (encoder, task, measure)
        return next(cell for cell in self.cells if (cell.encoder, cell.task, cell.measure) == wanted)


def _plain(values: Any) -> Any:
    """Values with texts as keys, as JSON has them."""
    if isinstance(values, dict):
        return {str(key): _plain(value) for key, value in values.items()}
    return [_plain(value) for value in values] if isinstance(values, list | tuple) else values


def gather(
    head: Mapping[str, str],
    scale: Scale,
    table: ScaledTable,
    expansion: Expansion,
    *,
    split: Split,
    failed: Mapping[str, str],
) -> TableResults:
    """Gather the results of a table that are there.

    Args:
        head: `table`, `title`, `note` and `scale` of the results.
        scale: how encoders were made and judged.
        table: rows, tasks and directions.
        expansion: pipeline of the table.
        split: videos on which all were judged.
        failed: reason for each stage that failed, by name.
    """
    minutes = _minutes(expansion.pipeline)
    cells = tuple(_cell(scale, table, expansion, key, minutes, failed) for key in _keys(expansion))
    figures = {(cell.encoder, cell.task, cell.measure): cell for cell in cells}
    measures = sorted({cell.measure for cell in cells})
    directions = tuple(
        _direction(direction, measure, figures)
        for direction in table.directions
        for measure in measures
        if all(
            (encoder, compared.task, measure) in figures
            for compared in direction.all_of
            for encoder in (compared.better, compared.than)
        )
    )
    encoders = tuple(
        EncoderCost(name, sum(stage in minutes for stage in stages), _mean(minutes, stages))
        for name, stages in expansion.encoders.items()
    )
    return TableResults(
        **head,
        split=split,
        seeds=expansion.seeds,
        cells=cells,
        directions=directions,
        encoders=encoders,
        cpu_minutes=round(sum(minutes.values()), 3),
    )


def _minutes(pipeline: Pipeline) -> dict[str, float]:
    """Minutes on CPUs of each stage that ran here."""
    records = {name: Record.load(pipeline, name) for name in pipeline.stages}
    return {
        name: record.cpu_minutes
        for name, record in records.items()
        if record is not None and record.cpu_minutes is not None
    }


def _mean(minutes: Mapping[str, float], stages: Sequence[str]) -> float | None:
    known = [minutes[stage] for stage in stages if stage in minutes]
    return round(fmean(known), 3) if known else None


Key = tuple[str, str, Measure]


def _keys(expansion: Expansion) -> list[Key]:
    return list(dict.fromkeys((cell.encoder, cell.task, cell.measure) for cell in expansion.cells))


def _cell(
    scale: Scale,
    table: ScaledTable,
    expansion: Expansion,
    key: Key,
    minutes: Mapping[str, float],
    failed: Mapping[str, str],
) -> CellResult:
    encoder, task, measure = key
    row = next(row for row in table.rows if row.encoder == encoder)
    spent: list[float] = []
    figures, missing = [], {}
    for cell in expansion.cells:
        if (cell.encoder, cell.task, cell.measure) != key:
            continue
        if all(stage in minutes for stage in cell.stages):
            spent.append(sum(minutes[stage] for stage in cell.stages))
        figure = _figure(expansion.pipeline, cell)
        if figure is None:
            missing[cell.seed] = failed.get(cell.stage, "has not been run")
        else:
            figures.append(figure)
    top1 = interval([figure.top1 for figure in figures]) if figures else None
    cpu = round(fmean(spent), 3) if spent else None
    # The paper's figures are of fine-tuning.
    published = row.published.get(scale.tasks[task].published_as) if measure == "finetune" else None
    return CellResult(row.row, encoder, task, measure, tuple(figures), top1, published, missing, cpu)


def _figure(pipeline: Pipeline, cell: Cell) -> SeedFigure | None:
    file, record = stage_output(pipeline, cell.stage), Record.load(pipeline, cell.stage)
    if record is None or not file.is_file():
        return None
    summary = json.loads(file.read_text())
    source = str(file.relative_to(pipeline.folder))
    return SeedFigure(cell.seed, 100 * summary["top1"], summary["videos"], record.config_hash, record.commit, source)


def _direction(direction: Direction, measure: Measure, cells: Mapping[Key, CellResult]) -> DirectionResult:
    compared = tuple(_comparison(comparison, measure, cells) for comparison in direction.all_of)
    verdicts = {comparison.verdict for comparison in compared}
    verdict: Verdict = "cannot be told"
    if "does not hold" in verdicts:
        verdict = "does not hold"
    elif verdicts == {"holds"}:
        verdict = "holds"
    return DirectionResult(direction.says, measure, compared, verdict)


def _comparison(comparison: Comparison, measure: Measure, cells: Mapping[Key, CellResult]) -> ComparisonResult:
    better, than = (
        {figure.seed: figure.top1 for figure in cells[name, comparison.task, measure].seeds}
        for name in (comparison.better, comparison.than)
    )
    differences = {seed: better[seed] - than[seed] for seed in better if seed in than}
    difference = interval(list(differences.values())) if differences else None
    verdict: Verdict = "cannot be told"
    if difference is not None and difference.low is not None and difference.high is not None:
        if difference.low > 0:
            verdict = "holds"
        elif difference.high < 0:
            verdict = "does not hold"
    return ComparisonResult(
        comparison.better, comparison.than, comparison.task, measure, differences, difference, verdict
    )
