"""`mvd-scale detect evaluate`: frame mAP of a trained action detector on the boxes of a person detector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mvd_scale.checkpoints.reading import digest, tensors_digest
from mvd_scale.checkpoints.weights import build_detector, read_checkpoint
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.detection import DetectionTest
from mvd_scale.config.training import Precision
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.loaders.view_loader import ViewShape
from mvd_scale.data.manifest import Manifest
from mvd_scale.detection.annotations import (
    ANY_NUMBER_OF_CLASSES,
    read_actions,
    read_excluded,
    read_ground_truth,
    read_results,
    write_results,
)
from mvd_scale.detection.metrics import FrameMap, compute_frame_map
from mvd_scale.detection.testing import BoxScorer, DetectionTestData, ScoredKeyFrame, make_frame_loader
from mvd_scale.detection.whole_frames import WholeFrameLoader
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.evaluation.sharded_run import ResultShards
from mvd_scale.models.precision import check_precision, dtype_of
from mvd_scale.utils.io import write_atomic

_SHARD = 32
"""Key frames per shard of scores: the unit of work of a rank, and the most that is lost if the process is killed."""


@dataclass(frozen=True)
class DetectionFigures:
    """Figures of a finished evaluation."""

    frame_map: float
    actions: int
    """Number of actions that the mean is over."""

    key_frames: int
    """Key frames in all, decoded or not."""

    not_decoded: int

    @classmethod
    def of(cls, score: FrameMap, key_frames: int, not_decoded: int) -> DetectionFigures:
        """Build from a score and the number of key frames, in all and not decoded."""
        return cls(score.mean, score.tested, key_frames, not_decoded)

    def to_text(self) -> str:
        """Format the figures, one per line."""
        return "\n".join(
            [
                f"key frames           {self.key_frames}",
                f"not decoded          {self.not_decoded}, counted as without any detection",
                f"frame mAP            {100 * self.frame_map:.2f} % over {self.actions} actions, IoU 0.5",
            ]
        )


def run_detection_evaluation(
    checkpoint: Path,
    data: DataConfig,
    test: DetectionTest,
    out: Path,
    ranks: Ranks,
    *,
    batch: int,
    precision: Precision,
    per_frame: int | None,
) -> DetectionFigures:
    """Evaluate a detector; continues an interrupted evaluation in the same folder. All ranks must call it.

    Args:
        checkpoint: weights that `mvd-scale detect train` wrote.
        data: `source` and `root` give the videos.
        test: files of annotations, boxes of people and actions.
        out: folder for `results.csv` (the official format), `actions.csv` and `summary.json`.
        ranks: this process among all; each evaluates its share.
        batch: key frames that a rank decodes in one batch.
        precision: precision of the detector.
        per_frame: largest number of boxes that count per key frame, those of the highest scores; all if None.

    Raises:
        UserError: weights, annotations or videos do not fit each other, or `out` holds another evaluation.
    """
    check_precision(precision, ranks.device)
    read = read_checkpoint(checkpoint)
    detector = build_detector(read).eval().requires_grad_(False).to(ranks.device, dtype_of(precision))
    data = data.model_copy(update={"stride": (read.views or ViewsConfig()).stride})
    shards = ResultShards(out, "scores", "parquet", _SHARD)
    config, files = detector.config, (test.annotations, test.boxes, test.excluded)

    def prepare() -> None:
        settings: dict[str, Any] = {
            "weights": tensors_digest(read.tensors()), "checkpoint": str(checkpoint),
            "source": data.source, "root": data.root,
            "test": [None if file is None else _digest(file) for file in files],
            "score": test.score, "starts_at": test.starts_at, "short_side": test.short_side, "precision": precision,
        }  # fmt: skip
        shards.claim(settings)
        manifest = shards.open(data)
        DetectionTestData.open(test, manifest, config.classes, "the test")
        manifest.save(shards.manifest)

    run_on_rank0(ranks, f"test {out}", prepare)
    told = DetectionTestData.open(test, Manifest.load(shards.manifest), config.classes, "the test")
    score = BoxScorer(detector, config, read.model.patch_size)

    def load(items: NDArray[np.int64]) -> WholeFrameLoader:
        shape = ViewShape(read.model.frames, test.short_side)
        return make_frame_loader(
            told, items, data, shape, batch=batch, rank=ranks.data_rank, quarantine=Quarantine(shards.quarantine)
        )

    rows = np.arange(len(told.key_frames))
    parts = shards.write_missing(
        rows, ranks, load=load, results=lambda frames: score.frames(frames, told), write=_write
    )

    def finish() -> Mapping[str, Any]:
        scores, not_decoded = _read(parts, told, config.classes)
        found = told.found(scores)
        write_results(out / "results.csv", found)
        judged = told.compute_map(found, per_frame)
        judged.write(out / "actions.csv")
        figures = vars(DetectionFigures.of(judged, len(told.key_frames), not_decoded))
        write_atomic(out / "summary.json", json.dumps(figures, indent=2) + "\n")
        return figures

    return DetectionFigures(**run_on_rank0(ranks, f"figures {out}", finish))


def score_results(
    results: Path, annotations: Path, actions: Path, excluded: Path | None, per_frame: int | None
) -> FrameMap:
    """Compute the frame mAP of results in the official format, from any program.

    Raises:
        UserError: a file is invalid, or the files do not fit each other.
    """
    return compute_frame_map(
        read_ground_truth(annotations, ANY_NUMBER_OF_CLASSES),
        read_results(results, ANY_NUMBER_OF_CLASSES),
        read_actions(actions, ANY_NUMBER_OF_CLASSES),
        frozenset() if excluded is None else read_excluded(excluded),
        per_frame=per_frame,
    )


def _digest(file: Path) -> str:
    try:
        return digest(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _write(file: Path, results: list[ScoredKeyFrame]) -> None:
    columns = {
        "key_frame": [result.row for result in results],
        "decoded": [result.decoded for result in results],
        "scores": [result.scores.ravel() for result in results],
    }
    pq.write_table(pa.table(columns), file)


def _read(files: list[Path], test: DetectionTestData, classes: int) -> tuple[NDArray[np.float32], int]:
    """Read the scores of all people, (X, C), and count the key frames that could not be decoded."""
    scores, not_decoded = np.full((len(test.people), classes), np.nan, np.float32), 0
    for file in files:
        table = pq.read_table(file)
        for row, flat in zip(table["key_frame"].to_pylist(), table["scores"], strict=True):
            scores[test.on(row)] = np.asarray(flat.values).reshape(-1, classes)
        not_decoded += table["decoded"].to_pylist().count(False)
    return scores, not_decoded
