"""`mvd-scale evaluate`: multi-view evaluation of a classifier (Sec. 4.1); a video is decoded once for all its views.

Legend: X videos, V views, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.checkpoints.roles import identify_checkpoint
from mvd_scale.checkpoints.weights import build_classifier, read_checkpoint
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.training import FrozenPrecision
from mvd_scale.data.batch import ViewBatch
from mvd_scale.data.loaders.view_loader import ViewShape
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.evaluation.labels import check_labels
from mvd_scale.evaluation.metrics import Predictions
from mvd_scale.evaluation.results import EvalResult, Origin, as_lists
from mvd_scale.evaluation.scorer import ClipScorer, views_from_checkpoint
from mvd_scale.evaluation.sharded_run import ResultShards, failures

logger = logging.getLogger("mvd_scale")

_SHARD = 32
"""Videos per shard of scores: the unit of work of a rank, and the most that is lost if the process is killed."""


def run_evaluation(
    checkpoint: Path | Checkpoint,
    data: DataConfig,
    views: Mapping[str, Any],
    out: Path,
    ranks: Ranks,
    *,
    batch: int,
    precision: FrozenPrecision,
    command: str,
) -> EvalResult:
    """Evaluate a classifier on all videos of a source; continues an interrupted evaluation. All ranks must call it.

    Args:
        checkpoint: a fine-tuned classifier in any known format, or what was read of it.
        data: `source` and `root` give the videos; workers and time limit apply to decoding.
        views: fields of `ViewsConfig` that replace those stored in the checkpoint.
        out: folder for the results.
        ranks: this process among all; each evaluates its share.
        batch: videos that a rank decodes in one batch.
        precision: precision of the classifier.
        command: the command line, which is stored with the results.

    Returns:
        the finished evaluation, as it was written to `out`.

    Raises:
        UserError: weights, videos or labels do not fit each other, or `out` holds another evaluation.
    """
    read = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    score = ClipScorer(build_classifier(read), ranks.device, precision)
    classes = read.classes
    assert classes is not None
    chosen = views_from_checkpoint(read, views)
    shards = ResultShards(out, "scores", "parquet", _SHARD)
    settings: dict[str, Any] = {
        "checkpoint": read.source, "source": data.source, "root": data.root, "views": chosen.model_dump(),
        "precision": precision,
    }  # fmt: skip

    def prepare() -> dict[str, Any]:
        model = identify_checkpoint(read)
        shards.claim(settings | {"weights": model["weights"], "positions": model["positions"]})
        manifest = shards.open(data)
        check_labels(manifest, classes, "the test")
        _check_names(manifest.classes, read.class_names)
        manifest.save(shards.manifest)
        return model

    model = run_on_rank0(ranks, f"test {out}", prepare)
    manifest = Manifest.load(shards.manifest)
    files = shards.write_missing_views(
        manifest,
        data,
        chosen,
        ViewShape.of(read.model),
        ranks,
        batch=batch,
        results=lambda part: _results(part, score, manifest, classes),
        write=_write,
    )
    known = read.class_names or manifest.classes or [str(c) for c in range(classes)]
    predictions, names = _outcome(manifest, files, (chosen.clips * chosen.crops, classes))
    origin = Origin(command, [read.source], str(data.source), precision, *_words(chosen), model)
    reasons = failures(out, manifest)
    tested = EvalResult(out, predictions, names, list(known), origin, reasons)
    run_on_rank0(ranks, f"figures {out}", tested.write)
    return tested


def _words(views: ViewsConfig) -> tuple[str, list[str]]:
    """Describe the views in words: all of them in one phrase, and one name per view."""
    frames = f"dense, stride {views.stride}" if views.sampling == "dense" else "uniform"
    names = [f"clip {clip}, crop {crop}" for clip in range(1, views.clips + 1) for crop in range(1, views.crops + 1)]
    return f"{views.clips} clips x {views.crops} crops, {frames}", names


def ensemble_results(folders: Sequence[Path], out: Path, command: str) -> EvalResult:
    """Average the scores of several models that were evaluated on the same videos.

    Args:
        folders: folders of their evaluations.
        out: folder for the results; it must be new or empty.
        command: the command line, which is stored with the results.

    Raises:
        UserError: the evaluations have different videos or class names, or `out` is not empty.
    """
    parts = [EvalResult.load(folder) for folder in folders]
    first = parts[0]
    for folder, part in zip(folders, parts, strict=True):
        if list(part.names) != list(first.names) or (part.predictions.labels != first.predictions.labels).any():
            raise UserError(f"{folder} and {folders[0]} are evaluations of different videos: they cannot be merged")
        if list(part.classes) != list(first.classes):
            raise UserError(f"{folder} and {folders[0]} have different class names: they cannot be merged")
    # Each model becomes one view of the merged result.
    views = np.stack([part.predictions.scores for part in parts], axis=1)
    decoded = np.all([part.predictions.decoded for part in parts], axis=0)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose a new folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    origin = Origin(
        command,
        checkpoints=[checkpoint for part in parts for checkpoint in part.origin.checkpoints],
        source=first.origin.source,
        precision=", ".join(dict.fromkeys(part.origin.precision for part in parts)),
        described=f"the mean of {len(parts)} tests, " + "; ".join(dict.fromkeys(p.origin.described for p in parts)),
        views=[str(folder) for folder in folders],
    )
    reasons = {video: reason for part in parts for video, reason in part.reasons.items()}
    merged = EvalResult(
        out, Predictions(first.predictions.labels, decoded, views), first.names, first.classes, origin, reasons
    )
    merged.write()
    Manifest.load(folders[0] / "manifest.parquet").save(out / "manifest.parquet")
    return merged


def _check_names(tested: Sequence[str], learnt: Sequence[str]) -> None:
    if learnt and not tested:
        logger.warning(
            "the labels of the test are numbers: they are taken as those of the checkpoint's classes, 0 for %s, 1 for "
            "%s and so on. `mvd-scale data index --classes` states the names",
            *[*learnt, "another"][:2],
        )
    if tested and learnt and list(tested) != list(learnt):
        differing = [c for c, (one, other) in enumerate(zip(tested, learnt, strict=False)) if one != other]
        where = f"class {differing[0]} is {tested[differing[0]]!r}, there {learnt[differing[0]]!r}" if differing else ""
        raise UserError(
            f"the {len(tested)} classes of the videos are not the {len(learnt)} classes of the checkpoint"
            + (f": {where}" if where else "")
        )


Result = dict[str, Any]


def _outcome(manifest: Manifest, files: Sequence[Path], shape: tuple[int, int]) -> tuple[Predictions, list[str]]:
    """Collect all labelled videos in the order of the manifest; those without a result count as not decoded."""
    rows = np.flatnonzero(manifest.label >= 0)
    decoded, views = np.zeros(len(rows), dtype=np.bool_), np.zeros((len(rows), *shape), dtype=np.float32)
    for file in files:
        table = pq.read_table(file)
        places = np.searchsorted(rows, table["video"].to_numpy())
        decoded[places] = table["decoded"].to_numpy(zero_copy_only=False)
        views[places] = np.stack(table["views"].to_numpy()).reshape(-1, *shape)
    return Predictions(manifest.label[rows], decoded, views), [manifest.name[row] for row in rows.tolist()]


def _results(batch: ViewBatch, score: ClipScorer, manifest: Manifest, classes: int) -> Iterator[Result]:
    for k, row in enumerate(batch.video_ids.tolist()):
        clips = batch.pixels[k].flatten(0, 1)
        decoded = bool(batch.decoded[k])
        scores = score(clips).cpu() if decoded else torch.zeros(len(clips), classes)
        if not torch.isfinite(scores).all():
            raise UserError(f"{manifest.name[row]}: its scores are not finite; evaluate with another --precision")
        yield {
            "video": row,
            "label": int(manifest.label[row]),
            "decoded": decoded,
            "views": scores.flatten().numpy(),
        }


def _write(file: Path, results: list[Result]) -> None:
    columns = {name: [result[name] for result in results] for name in ("video", "label", "decoded")}
    pq.write_table(pa.table({**columns, "views": as_lists(np.stack([result["views"] for result in results]))}), file)
