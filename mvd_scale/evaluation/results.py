"""Result of a finished evaluation and its folder: figures, scores of every video, and their origin."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mvd_scale.errors import UserError
from mvd_scale.evaluation.metrics import Predictions
from mvd_scale.utils.io import write_atomic


@dataclass(frozen=True)
class Origin:
    """Inputs of an evaluation."""

    command: str
    """Command line of the evaluation."""

    checkpoints: list[str]
    source: str
    """Source of the videos."""

    precision: str
    described: str
    """Description of the views in words."""

    views: list[str]
    """Name of each view, V of them."""

    model: dict[str, Any] | None = None
    """`identify_checkpoint` of the model that alone was tested; None for ensembles, probes and older results."""


@dataclass(frozen=True)
class EvalResult:
    """Result of a finished evaluation, with its folder."""

    out: Path
    predictions: Predictions
    names: Sequence[str]
    """Names of the videos."""

    classes: Sequence[str]

    origin: Origin

    reasons: Mapping[int, str]
    """Reasons why videos could not be decoded, by position in `names`, because names may be repeated."""

    def to_text(self) -> str:
        """Format the figures, one per line."""
        notes = {"not decoded": ", counted as wrong"}
        lines = [f"{title:<20} {text}{notes.get(title, '')}" for title, text in self.figures()]
        views = "  ".join(f"{100 * value:.2f}" for value in self.predictions.view_accuracy)
        return "\n".join([*lines, f"{'views, top-1':<20} {views}"])

    def figures(self) -> list[tuple[str, str]]:
        """Return title and formatted value of each figure."""
        predictions = self.predictions
        return [
            ("videos", str(len(predictions.labels))),
            ("not decoded", str(int((~predictions.decoded).sum()))),
            ("top-1", percent(predictions.top(1))),
            ("top-5", percent(predictions.top(5))),
            ("mean class accuracy", percent(predictions.mean_class_accuracy)),
            ("calibration error", percent(predictions.calibration_error)),
        ]

    def write(self) -> None:
        """Write `summary.json`, `scores.parquet` and the tables `classes.csv`, `confusion.csv`, `not_decoded.csv`."""
        predictions = self.predictions
        tested = {"checkpoints": self.origin.checkpoints, "model": self.origin.model}
        write_atomic(self.out / "summary.json", json.dumps(predictions.summary() | tested, indent=2) + "\n")
        table = pa.table(
            {
                "name": list(self.names),
                "label": predictions.labels,
                "decoded": predictions.decoded,
                "prediction": predictions.predicted,
                "scores": as_lists(predictions.scores),
                "views": as_lists(predictions.views.reshape(len(predictions.labels), -1)),
            }
        )
        described = {
            "shape": list(predictions.views.shape[1:]),
            "classes": list(self.classes),
            "origin": asdict(self.origin),
        }
        partial = self.out / "scores.parquet.partial"
        pq.write_table(table.replace_schema_metadata({"mvd_scale": json.dumps(described)}), partial)
        os.replace(partial, self.out / "scores.parquet")
        confusion, accuracy = predictions.confusion, predictions.class_accuracy
        with (self.out / "classes.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "name", "videos", "top1", "most_often_taken_for"])
            for c, name in enumerate(self.classes):
                others = confusion[c, :-1].copy()
                others[c] = 0
                taken = self.classes[int(others.argmax())] if others.any() else ""
                writer.writerow([c, name, int(confusion[c].sum()), f"{accuracy[c]:.4f}", taken])
        with (self.out / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["label", *self.classes, "not decoded"])
            writer.writerows([name, *row] for name, row in zip(self.classes, confusion.tolist(), strict=True))
        with (self.out / "not_decoded.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("video", "name", "reason"), *self.failures()])

    def failures(self) -> list[tuple[int, str, str]]:
        """Return position, name and reason of all videos that could not be decoded."""
        failed = np.flatnonzero(~self.predictions.decoded).tolist()
        # If the process was killed while it wrote the reason, the reason is unknown.
        return [(video, self.names[video], self.reasons.get(video, "cannot be decoded")) for video in failed]

    @classmethod
    def load(cls, out: Path) -> EvalResult:
        """Read a finished evaluation from its folder.

        Raises:
            UserError: the folder holds no finished evaluation.
        """
        file = out / "scores.parquet"
        if not file.is_file():
            raise UserError(f"{out} holds no finished evaluation: expected {file}, which `mvd-scale evaluate` writes")
        table = pq.read_table(file)
        described = json.loads(table.schema.metadata[b"mvd_scale"])
        views = np.stack(table["views"].to_numpy()).astype(np.float32).reshape(len(table), *described["shape"])
        predictions = Predictions(table["label"].to_numpy(), table["decoded"].to_numpy(zero_copy_only=False), views)
        with (out / "not_decoded.csv").open(newline="", encoding="utf-8") as lines:
            reasons = {int(line["video"]): line["reason"] for line in csv.DictReader(lines)}
        origin = Origin(**described["origin"])
        return cls(out, predictions, table["name"].to_pylist(), described["classes"], origin, reasons)


def percent(share: float) -> str:
    """Format a share (0 to 1) in percent."""
    return f"{100 * share:.2f} %"


def as_lists(values: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Convert float32 (rows, length) to an Arrow column of lists of fixed length."""
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
