"""`mvd-scale report RUN...`: runs, their tests and studies as one page, the same page again for the same files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from mvd_scale.errors import UserError
from mvd_scale.run_report.charts import DASHES, judged_charts, loss_charts, machine_charts, optimizer_charts
from mvd_scale.run_report.records import UNKNOWN, PictureFile, RunRecord, read_record
from mvd_scale.run_report.results import Figure, StudyTable, read_comparison, read_study, read_test
from mvd_scale.run_report.settings import Differences, compare_settings
from mvd_scale.run_report.sources import Sources, find_sources
from mvd_scale.run_status import read_statuses
from mvd_scale.utils.io import write_atomic
from mvd_scale.visualization.page import render_page
from mvd_scale.visualization.svg import SERIES
from mvd_scale.visualization.thumbnails import data_url

_PICTURES_OF_RUN = 4
_PICTURES = 24
"""Largest numbers of pictures of predictions of a run, and of a page: each adds some 100 kB."""

_PICTURE_WIDTH = 1000
"""Largest width of a picture in pixels."""

_STYLES = len(SERIES) * len(DASHES)
"""Number of runs that curves tell apart."""

_KINDS = ("pre-training", "fine-tuning", "detection", UNKNOWN)


Read = TypeVar("Read")


@dataclass(frozen=True)
class ShownPicture:
    """Picture of predictions as a `data:` URL."""

    caption: str
    url: str


@dataclass(frozen=True)
class Filmstrip:
    """Pictures of one run over time."""

    name: str
    pictures: list[ShownPicture]
    available: int
    """Number of pictures in its folder."""


def write_run_report(paths: Sequence[Path], out: Path) -> list[str]:
    """Write the page of runs, tests and studies.

    Args:
        paths: folders of them, or folders up to four levels above.
        out: HTML file to write.

    Returns:
        a sentence for each path, and each file in place of a result, that is not on the page.

    Raises:
        UserError: no path holds anything to show.
    """
    sources = find_sources(paths)
    if not sources.folders:
        raise UserError("\n".join(sources.left_out))
    left_out = list(sources.left_out)
    figures, studies = _results(sources, left_out)
    chosen, undrawn = _choose_runs(sources.runs, studies)
    records = [read_record(sources.name(status.path), status) for status in read_statuses(chosen)]
    page = render_runs(sources.title, records, figures, studies, left_out, undrawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page)
    return left_out


def _results(sources: Sources, left_out: list[str]) -> tuple[list[Figure], list[StudyTable]]:
    """Read all results; those that cannot be read are named in `left_out`."""

    def read(read_one: Callable[[str, Path], Read], folders: list[Path]) -> list[Read]:
        held = []
        for folder in folders:
            try:
                held.append(read_one(sources.name(folder), folder))
            except UserError as error:
                left_out.append(str(error))
        return held

    figures = [*read(read_test, sources.tests), *itertools.chain(*read(read_comparison, sources.comparisons))]
    return figures, read(read_study, sources.studies)


def _choose_runs(runs: list[Path], studies: list[StudyTable]) -> tuple[list[Path], str]:
    """Choose the runs that a page shows: all of them, unless runs of studies make them more than curves tell apart.

    Then only the pre-training of the studies' encoders is shown of these, or the first runs if none is known by its
    name, as far as they fit beside the other runs.

    Returns:
        the runs in their order, and a sentence about the others; empty if there are none.
    """
    within = {run: study for study in studies for run in runs if study.folder in run.parents}
    if len(runs) <= _STYLES or not within:
        return runs, ""
    trained = [run for run, study in within.items() if _trains_encoder(run, study)]
    fit = max(_STYLES - (len(runs) - len(within)), 0)
    hidden = within.keys() - set((trained or list(within))[:fit])
    if not hidden:
        return runs, ""
    names = " ".join(f"{name}/RUN..." for name in dict.fromkeys(within[run].name for run in runs if run in hidden))
    told = f"{len(hidden)} of {len(runs)} runs are not drawn: `mvd-scale report {names}` draws the runs that it names."
    return [run for run in runs if run not in hidden], told


def _trains_encoder(run: Path, study: StudyTable) -> bool:
    """Whether a run in the folder of a study is named after one of its encoders, with or without a seed."""
    stage = run.relative_to(study.folder).parts[0]
    return re.sub(r"_seed\d+$", "", stage) in {encoder for encoder, _, _ in study.encoders}


def render_runs(
    title: str,
    records: Sequence[RunRecord],
    figures: list[Figure],
    studies: list[StudyTable],
    left_out: list[str],
    undrawn: str = "",
) -> str:
    """Render the page; `left_out` is what it does not show, `undrawn` a sentence about runs that it does not."""
    kinds = [kind for kind in _KINDS if any(record.kind == kind for record in records)]
    strips, broken = _filmstrips(records)
    gaps = [f"{record.name}: {gap}" for record in records for gap in record.gaps]
    return render_page(
        "runs.html",
        title=title,
        records=records,
        overview=_overview(records),
        undrawn=undrawn,
        marks=[(place % len(SERIES), DASHES[place // len(SERIES) % len(DASHES)]) for place in range(len(records))],
        sections=[
            *((_heading("Loss", kind, kinds), loss_charts(records, kind)) for kind in kinds),
            ("Validation and probe", judged_charts(records)),
            ("Optimizer", optimizer_charts(records)),
            ("Machine", machine_charts(records)),
        ],
        differences=[(kind, *_differences(records, kind)) for kind in kinds if kind != UNKNOWN],
        strips=strips,
        measures=[
            (measure, chosen, _scale(chosen))
            for measure in dict.fromkeys(figure.measure for figure in figures)
            if (chosen := [figure for figure in figures if figure.measure == measure])
        ],
        studies=[(study, [_scale(column) for column in _columns(study)]) for study in studies],
        environments=_environments(records),
        missing=[*left_out, *gaps, *broken],
    )


def _overview(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Make the columns of the table of runs; those that no run has anything in are left out."""
    columns: dict[str, list[str]] = {
        "kind": [record.kind for record in records],
        "state": [str(record.status.state) for record in records],
        "step": [
            str(status.step) if status.total_steps is None else f"{status.step}/{status.total_steps}"
            for status in (record.status for record in records)
        ],
        "last loss": [_number(record.status.loss, ".4f") for record in records],
        "clips/s": [_number(record.status.clips_per_second, ".1f") for record in records],
        "ranks": [_count(record.status.ranks) for record in records],
        "starts": [_count(record.events["start"]) for record in records],
        "restarts": [_count(record.status.restarts) for record in records],
        "faults": [_count(record.status.faults) for record in records],
        "videos not decoded": [_count(record.status.quarantined) for record in records],
    }
    return {title: cells for title, cells in columns.items() if any(cells)}


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else ""


def _count(value: int | None) -> str:
    return str(value or "")


def _heading(word: str, kind: str, kinds: list[str]) -> str:
    return f"{word}: {kind}" if len(kinds) > 1 else word


def _differences(records: Sequence[RunRecord], kind: str) -> tuple[list[str], Differences]:
    chosen = [record for record in records if record.kind == kind]
    return [record.name for record in chosen], compare_settings([record.settings for record in chosen])


def _columns(study: StudyTable) -> list[list[Figure]]:
    return [
        [cell for _, cells in study.rows if isinstance(cell := cells[place], Figure)]
        for place in range(len(study.columns))
    ]


def _scale(figures: Sequence[Figure]) -> tuple[float, float]:
    """Return the range of values that bars of figures have in common; wider than a point."""
    ends = [end for figure in figures for end in (figure.value, *(figure.interval or ()))]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    spare = 0.06 * (high - low) or 0.01
    # Shares have ends; their differences have not, nor have intervals of a mean over seeds.
    return low - spare if low < 0 else max(low - spare, 0.0), high + spare if high > 1 else min(high + spare, 1.0)


def _filmstrips(records: Sequence[RunRecord]) -> tuple[list[Filmstrip], list[str]]:
    """Read pictures of predictions, and a sentence for each that cannot be read."""
    shown = [record for record in records if record.pictures]
    count = min(_PICTURES_OF_RUN, max(_PICTURES // max(len(shown), 1), 1))
    strips, broken = [], []
    for record in shown:
        pictures = []
        for picture in _spread(record.pictures, count):
            try:
                pictures.append(ShownPicture(_caption(picture), _load(picture.path)))
            except (OSError, ValueError, SyntaxError) as error:
                broken.append(f"{record.name}: {picture.path.name} cannot be read: {error}")
        if pictures:
            strips.append(Filmstrip(record.name, pictures, len(record.pictures)))
    return strips, broken


def _spread(pictures: list[PictureFile], count: int) -> list[PictureFile]:
    """Choose pictures evenly, the last one always, and the first one unless only one is chosen."""
    if count == 1:
        return pictures[-1:]
    places = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    return [pictures[place] for place in places.tolist()]


def _caption(picture: PictureFile) -> str:
    return "at the end" if picture.step is None else f"after step {picture.step}"


def _load(path: Path) -> str:
    with Image.open(path) as picture:
        converted = picture.convert("RGB")
    width = min(converted.width, _PICTURE_WIDTH)
    return data_url(converted.resize((width, max(converted.height * width // converted.width, 1))))


def _environments(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Group the names of runs by their description of the machine."""
    texts = dict.fromkeys(record.environment for record in records if record.environment)
    return [(text, [record.name for record in records if record.environment == text]) for text in texts]
