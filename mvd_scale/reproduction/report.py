"""Results of a table as text."""

from __future__ import annotations

from collections.abc import Iterator

from mvd_scale.reproduction.results import CellResult, TableResults

_MEASURES = {"finetune": "fine-tuning", "probe": "linear probe"}


def to_text(results: TableResults) -> str:
    """Format a table beside the paper's figures, the directions of the paper, and what is missing."""
    return "\n".join(_lines(results))


def _lines(results: TableResults) -> Iterator[str]:
    seeds = ", ".join(map(str, results.seeds))
    yield f"{results.title} ({results.scale}, {results.split} videos, seeds {seeds})"
    yield "top-1 in percent, mean over seeds ± half of the 95 % interval (Student t); in brackets the paper's"
    yield from _aligned(list(_table(results)))
    if results.note:
        yield f"The paper's: {results.note}"
    yield from _directions(results)
    yield from _missing(results)
    if results.cpu_minutes:
        trained = [
            f"{cost.encoder} {cost.cpu_minutes:.1f}" for cost in results.encoders if cost.cpu_minutes is not None
        ]
        yield ""
        yield f"minutes on CPUs for one seed, training: {', '.join(trained)}"
        yield f"minutes on CPUs for all that is there: {results.cpu_minutes:.1f}"


def _table(results: TableResults) -> Iterator[list[str]]:
    """Head and rows; a column for each task and measure, and one for the minutes of all of them."""
    columns = list(dict.fromkeys((cell.task, cell.measure) for cell in results.cells))
    yield ["", *(f"{task}, {_MEASURES[measure]}" for task, measure in columns), "CPU minutes to judge a seed"]
    for encoder, row in dict.fromkeys((cell.encoder, cell.row) for cell in results.cells):
        cells = [cell for cell in results.cells if cell.encoder == encoder]
        spent = [cell.cpu_minutes for cell in cells if cell.cpu_minutes is not None]
        yield [row, *map(_text, cells), f"{sum(spent):.1f}" if spent else "-"]


def _text(cell: CellResult) -> str:
    made = "-" if cell.top1 is None else cell.top1.to_text()
    return made if cell.published is None else f"{made} [{cell.published:.1f}]"


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        yield "  ".join([first, *rest]).rstrip()


def _directions(results: TableResults) -> Iterator[str]:
    for direction in results.directions:
        yield ""
        yield f"{direction.says} By {_MEASURES[direction.measure]}: {direction.verdict}."
        for compared in direction.comparisons:
            difference = "no seed has both" if compared.difference is None else compared.difference.to_text(signed=True)
            yield f"  {compared.better} - {compared.than}, {compared.task}: {difference} ({compared.verdict})"


def _missing(results: TableResults) -> Iterator[str]:
    for cell in results.cells:
        for seed, reason in cell.missing.items():
            yield f"missing: {cell.encoder}, {cell.task}, {_MEASURES[cell.measure]}, seed {seed}: {reason}"
