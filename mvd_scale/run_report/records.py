"""Record of a run for a report: state, settings, metrics over steps, pictures, and what is missing.

Any file may be missing, partial, or of another version: what cannot be read is named in `RunRecord.gaps`.

Legend: R readings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mvd_scale.run_dir import RunFolder
from mvd_scale.run_report.settings import Settings, flatten
from mvd_scale.run_status import RunStatus
from mvd_scale.utils.events import read_events
from mvd_scale.utils.io import read_metrics

_KINDS = {"targets": "pre-training", "classifier": "fine-tuning", "detector": "detection"}
"""Kind of a run by the section that only its recipe has."""

UNKNOWN = "unknown"
"""Kind of a run whose recipe cannot be read."""


@dataclass(frozen=True)
class Series:
    """Metric over steps."""

    steps: NDArray[np.int64]
    """Ascending numbers of optimizer steps (R,)."""
    values: NDArray[np.float64]
    """Values (R,); NaN where a reading has none, as the gradient norm of a step that overflowed."""


@dataclass(frozen=True)
class PictureFile:
    """Picture of predictions."""

    step: int | None
    """Optimizer steps at that time; None for the picture of the finished run."""
    path: Path


@dataclass
class RunRecord:
    """Run as the report shows it."""

    name: str
    status: RunStatus
    kind: str = UNKNOWN
    settings: Settings = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    """Metrics of the training by name."""
    judged: dict[str, Series] = field(default_factory=dict)
    """Shares that validation and probe measured, by name."""
    pictures: list[PictureFile] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    """Number of events by name."""
    environment: str = ""
    gaps: list[str] = field(default_factory=list)
    """A sentence for each thing that is missing."""

    @property
    def parent(self) -> Path | None:
        """Folder of the run of several students that this one is of; None for a run alone."""
        above = self.status.path.parent
        return above.parent if above.name == "students" else None


def read_record(name: str, status: RunStatus) -> RunRecord:
    """Read all files of a run that a report shows."""
    folder = RunFolder(status.path)
    record = RunRecord(name, status)
    _read_recipe(folder, record)
    record.series = series_by_name(_read_lines(folder.metrics, record))
    if not record.series:
        record.gaps.append("no readings yet" if folder.metrics.is_file() else "no metrics.jsonl, so no curves")
    record.judged = series_by_name(_judgements(folder, record))
    record.pictures = _pictures(folder)
    if record.kind == "pre-training" and not record.pictures and not any(folder.path.glob("students/*")):
        record.gaps.append("no pictures of predictions: see logging.pictures, and `mvd-scale draw` after the end")
    record.events = Counter(str(event.get("event")) for event in read_events(folder.events))
    try:
        record.environment = folder.environment.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        record.gaps.append("no environment.txt")
    return record


def series_by_name(readings: Iterable[dict[str, Any]]) -> dict[str, Series]:
    """Collect the numbers of readings by their name; of two readings of a step the later one counts."""
    by_step = {reading["step"]: reading for reading in readings if isinstance(reading.get("step"), int)}
    steps = sorted(by_step)
    names = dict.fromkeys(name for step in steps for name in by_step[step] if name != "step")
    series = {}
    for name in names:
        # JSON has null for a value that is not finite; a reading without the name is none of this metric.
        held = [step for step in steps if _is_number(by_step[step].get(name, ""))]
        if held:
            values = [by_step[step][name] for step in held]
            series[name] = Series(np.array(held), np.array(values, dtype=np.float64))
    return series


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _read_recipe(folder: RunFolder, record: RunRecord) -> None:
    # Without the schema: the recipe of another version is shown too.
    try:
        document = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        record.gaps.append(f"recipe.yaml {reason}, so no settings")
        return
    if isinstance(document, dict):
        record.settings = flatten(document)
        record.kind = next((kind for section, kind in _KINDS.items() if section in document), UNKNOWN)
    else:
        record.gaps.append("recipe.yaml holds no settings")


def _read_lines(path: Path, record: RunRecord) -> list[dict[str, Any]]:
    try:
        return read_metrics(path) if path.is_file() else []
    except OSError as error:
        record.gaps.append(f"{path.name} cannot be read: {error.strerror}")
        return []


def _judgements(folder: RunFolder, record: RunRecord) -> list[dict[str, Any]]:
    """Merge the readings of validation and probe under names of their own."""
    readings = [
        {"step": line.get("step")} | {f"validation {name}": value for name, value in line.items() if name != "step"}
        for line in _read_lines(folder.validation, record)
    ]
    for reading in readings:
        # It repeats one of the others.
        reading.pop("validation judged", None)
    readings += [
        {"step": line.get("step"), f"probe {line.get('kind')} top1": line.get("top1")}
        for line in _read_lines(folder.probe, record)
    ]
    merged: dict[Any, dict[str, Any]] = {}
    for reading in readings:
        merged.setdefault(reading["step"], {}).update(reading)
    return list(merged.values())


def _pictures(folder: RunFolder) -> list[PictureFile]:
    pictures = []
    for path in sorted(folder.pictures.glob("step_*.png")):
        found = re.fullmatch(r"step_(\d+)", path.stem)
        if found:
            pictures.append(PictureFile(int(found[1]), path))
    drawn = folder.path / "predictions.png"
    return [*pictures, PictureFile(None, drawn)] if drawn.is_file() else pictures
