"""Results that a report shows with their intervals: tests, comparisons of two tests, and the cells of a study.

A study is a folder with `results.json`. Of it are read, in percent:

- `title`, `scale`, `split`, `note`: texts, each of which may be missing;
- `cells`: `row` and, where rows have equal names, `encoder`; `task`, `measure`; `top1`, null or an
  object of `mean`, `half` (of the 95 % interval, or null) and `count` (seeds); `missing`, the reason by seed; where
  known, `published` (the paper's figure) and `cpu_minutes` of a seed;
- `encoders`: `encoder`, `seeds` (how many are trained), `cpu_minutes` of its training, or null; may be missing;
- `directions`: `says`, `measure`, `verdict` and `comparisons` of `better`, `than`, `task`, `difference` (as `top1`).

Other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvd_scale.errors import UserError
from mvd_scale.evaluation.comparison import Comparison, Estimate, wilson_interval
from mvd_scale.run_report.sources import STUDY
from mvd_scale.utils.io import read_json_object


@dataclass(frozen=True)
class Figure:
    """A share with its interval, if there is one, and what else is known of it."""

    name: str
    measure: str
    value: float
    interval: tuple[float, float] | None
    """Ends of the 95 % interval."""
    note: str = ""

    @classmethod
    def estimated(cls, name: str, measure: str, estimate: Estimate, note: str = "") -> Figure:
        """Build from an estimate."""
        return cls(name, measure, estimate.value, (estimate.low, estimate.high), note)


@dataclass(frozen=True)
class Absent:
    """Cell without a figure."""

    reason: str


@dataclass(frozen=True)
class StudyTable:
    """Cells of a study as a table of rows and columns, in the order in which the file has them."""

    name: str
    folder: Path
    title: str
    notes: list[str]
    columns: list[str]
    rows: list[tuple[str, list[Figure | Absent]]]
    claims: list[tuple[str, str, str]]
    """Claim, verdict and reasons."""
    encoders: list[tuple[str, int, float | None]]
    """Encoder, number of trained seeds, and minutes on CPUs of one of them where known."""


def read_test(name: str, folder: Path) -> Figure:
    """Read the main figure of a test: top-1 of videos, or frame mAP of boxes.

    Raises:
        UserError: `summary.json` does not hold it.
    """
    summary = read_json_object(folder / "summary.json")
    try:
        if "frame_map" in summary:
            note = f"{int(summary['key_frames'])} key frames, {int(summary['actions'])} actions"
            return Figure(name, "frame mAP", float(summary["frame_map"]), None, note)
        videos = int(summary["videos"])
        note = f"{videos} videos; top-5 {100 * float(summary['top5']):.1f} %"
        return Figure.estimated(name, "top-1", wilson_interval(float(summary["top1"]), videos), note)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'summary.json'} is not that of a finished test ({error!r})") from error


def read_comparison(name: str, folder: Path) -> list[Figure]:
    """Read a comparison: both accuracies and their difference.

    Raises:
        UserError: `comparison.json` does not hold them.
    """
    try:
        compared = Comparison.load(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/comparison.json cannot be read ({error!r})") from error
    note = f"{compared.videos} videos"
    return [
        Figure.estimated(f"{name}: first", "top-1", compared.first, note),
        Figure.estimated(f"{name}: second", "top-1", compared.second, note),
        Figure.estimated(f"{name}: first less second", "difference of top-1", compared.difference, note),
    ]


def read_study(name: str, folder: Path) -> StudyTable:
    """Read the cells of a study.

    Raises:
        UserError: `results.json` holds no cells.
    """
    document = read_json_object(folder / STUDY)
    try:
        names = {str(cell.get("encoder", cell["row"])): str(cell["row"]) for cell in document["cells"]}
        cells = {
            (str(cell.get("encoder", cell["row"])), f"{cell['task']}, {cell['measure']}"): _cell(cell)
            for cell in document["cells"]
        }
        claims = [_claim(direction) for direction in document.get("directions", [])]
        encoders = [_cost(encoder) for encoder in document.get("encoders", [])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / STUDY} holds no cells in the form of a study ({error!r})") from error
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = [
        (name, [cells.get((encoder, column), Absent("no such cell")) for column in columns])
        for encoder, name in names.items()
    ]
    about = [str(document[key]) for key in ("scale", "split") if document.get(key)]
    notes = [*([", ".join(about)] if about else []), *([str(document["note"])] if document.get("note") else [])]
    return StudyTable(name, folder, str(document.get("title", name)), notes, columns, rows, claims, encoders)


def _cost(encoder: Mapping[str, Any]) -> tuple[str, int, float | None]:
    minutes = encoder.get("cpu_minutes")
    return str(encoder["encoder"]), int(encoder["seeds"]), None if minutes is None else float(minutes)


def _cell(cell: Mapping[str, Any]) -> Figure | Absent:
    top1 = cell["top1"]
    if top1 is None:
        return Absent("; ".join(f"seed {seed}: {reason}" for seed, reason in cell.get("missing", {}).items()))
    mean, half = float(top1["mean"]) / 100, top1["half"]
    interval = None if half is None else (mean - float(half) / 100, mean + float(half) / 100)
    count, published = int(top1["count"]), cell.get("published")
    note = f"{count} seed{'' if count == 1 else 's'}"
    if published is not None:
        note += f"; the paper has {float(published):.1f}"
    if cell.get("cpu_minutes") is not None:
        note += f"; {float(cell['cpu_minutes']):.1f} minutes of CPU"
    return Figure(str(cell["row"]), str(cell["task"]), mean, interval, note)


def _claim(direction: Mapping[str, Any]) -> tuple[str, str, str]:
    reasons = []
    for compared in direction.get("comparisons", []):
        difference = compared["difference"]
        told = "no seed has both"
        if difference is not None:
            spread = "" if difference["half"] is None else f" \N{PLUS-MINUS SIGN} {float(difference['half']):.1f}"
            told = f"{float(difference['mean']):+.1f}{spread}"
        reasons.append(f"{compared['better']} less {compared['than']}, {compared['task']}: {told}")
    return f"{direction['says']} ({direction['measure']})", str(direction["verdict"]), "; ".join(reasons)
