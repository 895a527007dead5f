"""`mvd-scale evaluate`: the multi-view test of a classifier (Sec. 4.1), each video decoded once for all of its views.

Legend: X videos, V views, C classes.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mvd_scale.checkpoints.reading import tensors_digest
from mvd_scale.checkpoints.weights import build_classifier, read_checkpoint
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.training import Precision
from mvd_scale.data.batch import ViewBatch
from mvd_scale.data.index import open_source
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError
from mvd_scale.evaluation.labels import check_labels
from mvd_scale.evaluation.metrics import Outcome
from mvd_scale.evaluation.sharded import Shards
from mvd_scale.models import Classifier
from mvd_scale.training.engine import Ranks, check_precision, dtype_of, first_decides
from mvd_scale.training.run_folder import write_whole

_SHARD = 32
"""Videos of a shard of scores: what a kill may cost, and what a rank takes at a time."""


class Scorer:
    """A frozen classifier on its device and in its precision."""

    def __init__(self, classifier: Classifier, device: torch.device, precision: Precision) -> None:
        self.classifier = classifier.eval().requires_grad_(False).to(device, dtype_of(precision))

    @torch.inference_mode()
    def __call__(self, clips: Tensor) -> Tensor:
        """Softmax of clips: uint8 (V, T, S, S, 3) to float32 (V, C)."""
        return self.classifier(clips).float().softmax(1)


@dataclass(frozen=True)
class Tested:
    """A finished test in its folder."""

    out: Path
    outcome: Outcome
    names: Sequence[str]
    """Of the videos."""

    classes: Sequence[str]

    def to_text(self) -> str:
        """The figures, a line each."""
        figures = self.outcome.summary()
        lines = [
            f"videos               {figures['videos']}",
            f"not decoded          {figures['not_decoded']}, counted as wrong",
            *(
                f"{title:<20} {100 * self._number(key):.2f} %"
                for title, key in (
                    ("top-1", "top1"),
                    ("top-5", "top5"),
                    ("mean class accuracy", "mean_class_accuracy"),
                    ("calibration error", "calibration_error"),
                )
            ),
            "views, top-1         " + "  ".join(f"{100 * value:.2f}" for value in self.outcome.view_accuracy),
        ]
        return "\n".join(lines)

    def _number(self, key: str) -> float:
        value = self.outcome.summary()[key]
        assert isinstance(value, float)
        return value

    def write(self) -> None:
        """Leave `summary.json`, `scores.parquet`, `classes.csv` and `confusion.csv` in the folder."""
        outcome = self.outcome
        write_whole(self.out / "summary.json", json.dumps(outcome.summary(), indent=2) + "\n")
        table = pa.table(
            {
                "name": list(self.names),
                "label": outcome.labels,
                "decoded": outcome.decoded,
                "prediction": outcome.predictions,
                "scores": _listed(outcome.scores),
                "views": _listed(outcome.views.reshape(len(outcome.labels), -1)),
            }
        )
        described = {"shape": list(outcome.views.shape[1:]), "classes": list(self.classes)}
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
        return cls(out, outcome, table["name"].to_pylist(), described["classes"])


def evaluate(
    checkpoint: Path,
    data: DataConfig,
    views: Mapping[str, Any],
    out: Path,
    ranks: Ranks,
    *,
    batch: int,
    precision: Precision,
) -> Tested:
    """Test a classifier on all videos of a source, or go on where an earlier start was cut off. All ranks call it.

    Args:
        checkpoint: a fine-tuned classifier in any known format.
        data: `source` and `root` say which videos; workers and time limit how they are read.
        views: fields of `ViewsConfig` in which the test differs from the one that the checkpoint was meant for.
        out: folder of the results.
        ranks: each tests its share.
        batch: videos that a rank decodes together.
        precision: of the classifier.

    Raises:
        UserError: weights, videos or labels do not fit each other, or `out` holds another test.
    """
    check_precision(precision, ranks.device)
    read = read_checkpoint(checkpoint)
    score = Scorer(build_classifier(read), ranks.device, precision)
    classes = read.classes
    assert classes is not None
    chosen = ViewsConfig.model_validate((read.views or ViewsConfig()).model_dump() | dict(views))
    shards = Shards(out, "scores", "parquet", _SHARD)
    settings: dict[str, Any] = {
        "checkpoint": str(checkpoint), "source": data.source, "views": chosen.model_dump(), "precision": precision,
    }  # fmt: skip

    def prepare() -> None:
        shards.claim(settings | {"weights": tensors_digest(read.tensors())})
        file = out / "manifest.parquet"
        manifest = Manifest.load(file) if file.is_file() else open_source(data, out)
        check_labels(manifest, classes, "the test")
        _check_names(manifest.classes, read.class_names)
        manifest.save(file)

    first_decides(ranks, f"test {out}", prepare)
    manifest = Manifest.load(out / "manifest.parquet")
    files = shards.fill_views(
        manifest,
        data,
        chosen,
        read.model,
        ranks,
        batch=batch,
        results=lambda part: _results(part, score, manifest, classes),
        write=_write,
    )
    known = read.class_names or manifest.classes or [str(c) for c in range(classes)]
    outcome, names = _outcome(manifest, files, (chosen.clips * chosen.crops, classes))
    tested = Tested(out, outcome, names, list(known))

    def finish() -> None:
        tested.write()
        _list_failures(out, manifest, outcome)

    first_decides(ranks, f"figures {out}", finish)
    return tested


def merge_tests(folders: Sequence[Path], out: Path) -> Tested:
    """The mean score of several models, tested on the same videos.

    Raises:
        UserError: they were tested on other videos or name other classes.
    """
    parts = [Tested.load(folder) for folder in folders]
    first = parts[0]
    for folder, part in zip(folders, parts, strict=True):
        if list(part.names) != list(first.names) or (part.outcome.labels != first.outcome.labels).any():
            raise UserError(f"{folder} and {folders[0]} are tests of other videos: they cannot be merged")
        if list(part.classes) != list(first.classes):
            raise UserError(f"{folder} and {folders[0]} name other classes: they cannot be merged")
    # One view for each model.
    views = np.stack([part.outcome.scores for part in parts], axis=1)
    decoded = np.all([part.outcome.decoded for part in parts], axis=0)
    out.mkdir(parents=True, exist_ok=True)
    merged = Tested(out, Outcome(first.outcome.labels, decoded, views), first.names, first.classes)
    merged.write()
    return merged


def _check_names(tested: Sequence[str], learnt: Sequence[str]) -> None:
    if tested and learnt and list(tested) != list(learnt):
        differing = [c for c, (one, other) in enumerate(zip(tested, learnt, strict=False)) if one != other]
        where = f"class {differing[0]} is {tested[differing[0]]!r}, there {learnt[differing[0]]!r}" if differing else ""
        raise UserError(
            f"the {len(tested)} classes of the test are not the {len(learnt)} that the checkpoint names"
            + (f": {where}" if where else "")
        )


Result = dict[str, Any]


def _outcome(manifest: Manifest, files: Sequence[Path], shape: tuple[int, int]) -> tuple[Outcome, list[str]]:
    """All labelled videos in the order of the manifest; those that were left out of it could not be decoded either."""
    rows = np.flatnonzero(manifest.label >= 0)
    decoded, views = np.zeros(len(rows), dtype=np.bool_), np.zeros((len(rows), *shape), dtype=np.float32)
    for file in files:
        table = pq.read_table(file)
        places = np.searchsorted(rows, table["video"].to_numpy())
        decoded[places] = table["decoded"].to_numpy(zero_copy_only=False)
        views[places] = np.stack(table["views"].to_numpy()).reshape(-1, *shape)
    return Outcome(manifest.label[rows], decoded, views), [manifest.name[row] for row in rows.tolist()]


def _list_failures(out: Path, manifest: Manifest, outcome: Outcome) -> None:
    """Write `not_decoded.csv`: the videos that count as wrong, and why they could not be decoded."""
    reasons = dict(enumerate(manifest.left_out))
    quarantine = out / "quarantine.jsonl"
    if quarantine.is_file():
        reasons |= {line["row"]: line["error"] for line in map(json.loads, quarantine.read_text().splitlines())}
    rows = np.flatnonzero(manifest.label >= 0)[~outcome.decoded].tolist()
    with (out / "not_decoded.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "reason"), *((manifest.name[row], reasons[row]) for row in rows)])


def _results(batch: ViewBatch, score: Scorer, manifest: Manifest, classes: int) -> Iterator[Result]:
    for k, row in enumerate(batch.video_ids.tolist()):
        clips = batch.pixels[k].flatten(0, 1)
        decoded = bool(batch.decoded[k])
        scores = score(clips).cpu() if decoded else torch.zeros(len(clips), classes)
        yield {
            "video": row,
            "label": int(manifest.label[row]),
            "decoded": decoded,
            "views": scores.flatten().numpy(),
        }


def _write(file: Path, results: list[Result]) -> None:
    columns = {name: [result[name] for result in results] for name in ("video", "label", "decoded")}
    pq.write_table(pa.table({**columns, "views": _listed(np.stack([result["views"] for result in results]))}), file)


def _listed(values: Any) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
