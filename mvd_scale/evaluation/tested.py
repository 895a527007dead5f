"""A finished test and its folder: figures, scores of every video, and how they came about."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mvd_scale.errors import UserError
from mvd_scale.evaluation.metrics import Outcome
from mvd_scale.training.run_folder import write_whole


@dataclass(frozen=True)
class Origin:
    """What a test was made of."""

    command: str
    """The command line that made it."""

    checkpoints: list[str]
    source: str
    """Of the videos."""

    precision: str
    described: str
    """How the views were taken, in words."""

    views: list[str]
    """What each view is, (V,)."""


@dataclass(frozen=True)
class Tested:
    """A finished test in its folder."""

    out: Path
    outcome: Outcome
    names: Sequence[str]
    """Of the videos."""

    classes: Sequence[str]

    origin: Origin

    reasons: Mapping[int, str]
    """Why a video could not be decoded, by its place among the others: names may recur."""

    def to_text(self) -> str:
        """The figures, a line each."""
        notes = {"not decoded": ", counted as wrong"}
        lines = [f"{title:<20} {text}{notes.get(title, '')}" for title, text in self.figures()]
        views = "  ".join(f"{100 * value:.2f}" for value in self.outcome.view_accuracy)
        return "\n".join([*lines, f"{'views, top-1':<20} {views}"])

    def figures(self) -> list[tuple[str, str]]:
        """Title and value of the figures of the whole test, as they are shown."""
        outcome = self.outcome
        return [
            ("videos", str(len(outcome.labels))),
            ("not decoded", str(int((~outcome.decoded).sum()))),
            ("top-1", percent(outcome.top(1))),
            ("top-5", percent(outcome.top(5))),
            ("mean class accuracy", percent(outcome.mean_class_accuracy)),
            ("calibration error", percent(outcome.calibration_error)),
        ]

    def write(self) -> None:
        """Leave `summary.json`, `scores.parquet` and tables (`.csv`) of classes, confusion and failures."""
        outcome = self.outcome
        write_whole(self.out / "summary.json", json.dumps(outcome.summary(), indent=2) + "\n")
        table = pa.table(
            {
                "name": list(self.names),
                "label": outcome.labels,
                "decoded": outcome.decoded,
                "prediction": outcome.predictions,
                "scores": as_lists(outcome.scores),
                "views": as_lists(outcome.views.reshape(len(outcome.labels), -1)),
            }
        )
        described = {
            "shape": list(outcome.views.shape[1:]),
            "classes": list(self.classes),
            "origin": asdict(self.origin),
        }
        partial = self.out / "scores.parquet.partial"
        pq.write_table(table.replace_schema_metadata({"mvd_scale": json.dumps(described)}), partial)
        os.replace(partial, self.out / "scores.parquet")
        confusion, accuracy = outcome.confusion, outcome.class_accuracy
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
        """Place, name and reason of all videos that could not be decoded."""
        failed = np.flatnonzero(~self.outcome.decoded).tolist()
        # A kill may have torn the line that said why.
        return [(video, self.names[video], self.reasons.get(video, "cannot be decoded")) for video in failed]

    @classmethod
    def load(cls, out: Path) -> Tested:
        """A finished test from its folder.

        Raises:
            UserError: there is none.
        """
        file = out / "scores.parquet"
        if not file.is_file():
            raise UserError(f"{out} holds no finished test: expected {file}, which `mvd-scale evaluate` writes")
        table = pq.read_table(file)
        described = json.loads(table.schema.metadata[b"mvd_scale"])
        views = np.stack(table["views"].to_numpy()).astype(np.float32).reshape(len(table), *described["shape"])
        outcome = Outcome(table["label"].to_numpy(), table["decoded"].to_numpy(zero_copy_only=False), views)
        with (out / "not_decoded.csv").open(newline="", encoding="utf-8") as lines:
            reasons = {int(line["video"]): line["reason"] for line in csv.DictReader(lines)}
        origin = Origin(**described["origin"])
        return cls(out, outcome, table["name"].to_pylist(), described["classes"], origin, reasons)


def percent(share: float) -> str:
    """A share as it is shown."""
    return f"{100 * share:.2f} %"


def as_lists(values: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """A column of lists of one length, from (rows, length)."""
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
