"""`mvd-scale probe`: quality of a frozen encoder, measured by a small classifier on its features.

    all ranks write shards of features of the training and test videos -> rank 0 trains and evaluates the classifier

Legend: X videos, N tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvd_scale.checkpoints import Hints, read_checkpoint
from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import Positions
from mvd_scale.config.training import Precision
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.evaluation.features import FeatureOptions, write_features
from mvd_scale.evaluation.frozen_classifiers import attentive_classifier, linear_classifier, nearest_neighbours
from mvd_scale.evaluation.labels import check_labels, class_count
from mvd_scale.evaluation.metrics import Predictions
from mvd_scale.evaluation.results import EvalResult, Origin
from mvd_scale.evaluation.sharded_run import failures
from mvd_scale.models.attentive import AttentiveHead

Kind = Literal["knn", "linear", "attentive"]
_HEAD = 64
"""Channels per attention head; more if the width is not a multiple of it."""


@dataclass(frozen=True)
class FeatureFolder:
    """Folder that `write_features` wrote: features of one clip of each video that could be decoded."""

    folder: Path

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest of all videos."""
        return Manifest.load(self.folder / "manifest.parquet")

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (X_i, D) or (X_i, N, D) and labels int64 (X_i,) of each shard."""
        for shard in self._shards():
            yield shard["features"], shard["label"]

    def whole(self) -> tuple[Tensor, Tensor]:
        """Read all features, float32 (X, D), and labels, int64 (X,)."""
        features, labels = zip(*self.parts(), strict=True)
        return torch.cat(features).float(), torch.cat(labels)

    @property
    def videos(self) -> list[int]:
        """Rows of the manifest, in the order of the features, X of them."""
        return [row for shard in self._shards() for row in shard["video"].tolist()]

    def _shards(self) -> Iterator[dict[str, Tensor]]:
        for file in sorted(self.folder.glob("features_*.safetensors")):
            yield load_file(file)


@dataclass(frozen=True)
class FeatureClassifier:
    """Classifier of videos by their features."""

    kind: Kind
    """Kind of the classifier, and name of the folder of its results."""

    scores: Callable[[FeatureFolder, FeatureFolder, int], Tensor]
    """Function from training features, test features and C to scores of the X test videos (X, C) that sum to 1."""


@dataclass(frozen=True)
class ProbedEncoder:
    """Encoder whose features are probed, and settings of its forward pass."""

    checkpoint: Path
    """File of the weights, in any supported format."""

    precision: Precision

    batch: int
    """Videos per batch of a rank."""

    positions: Positions | None = None
    """Position table of the training, for weights that do not hold it."""


def run_probe(
    encoder: ProbedEncoder,
    classify: FeatureClassifier,
    train: DataConfig,
    test: DataConfig,
    options: FeatureOptions,
    out: Path,
    ranks: Ranks,
    *,
    command: str,
) -> EvalResult:
    """Evaluate an encoder by a classifier on its features; reuses features already written. All ranks must call it.

    Args:
        encoder: encoder to evaluate.
        classify: result of `knn_probe`, `linear_probe` or `attentive_probe`.
        train: labelled videos to train the classifier on.
        test: labelled videos to evaluate the classifier on.
        options: options of the features, such as the clip of each video; `pool` is set by the classifier.
        out: folder for features and results.
        ranks: this process among all; each rank encodes a share of the videos.
        command: command line to store with the results.

    Raises:
        UserError: weights or videos cannot be read, or the labels of the two sets do not fit each other.
    """
    pool: Literal["none", "clip"] = "none" if classify.kind == "attentive" else "clip"
    pool_tokens, folders = replace(options, pool=pool), []
    for part, data in (("train", train), ("test", test)):
        folder = out / f"{part}_{'tokens' if pool == 'none' else 'features'}"
        weights = read_checkpoint(encoder.checkpoint, Hints(positions=encoder.positions))
        write_features(weights, data, pool_tokens, folder, ranks, batch=encoder.batch, precision=encoder.precision)
        folders.append(FeatureFolder(folder))
    described = f"{classify.kind} probe of one clip in the middle, trained on {train.source}"
    origin = Origin(command, [str(encoder.checkpoint)], str(test.source), encoder.precision, described, ["middle"])
    results = out / classify.kind
    run_on_rank0(
        ranks, f"probe {classify.kind}", lambda: _judged(folders[0], folders[1], classify, results, origin).write()
    )
    return EvalResult.load(results)


def _judged(
    train: FeatureFolder, test: FeatureFolder, classify: FeatureClassifier, out: Path, origin: Origin
) -> EvalResult:
    classes = class_count(train.manifest)
    check_labels(train.manifest, classes, "the training set of the probe", every_class=True)
    check_labels(test.manifest, classes, "the test set of the probe", like=train.manifest)
    decoded = test.videos
    if not decoded or not train.videos:
        raise UserError("no video of the probe could be decoded: see quarantine.jsonl in the folders of the features")
    # Labelled videos without features, which could not be decoded, count as wrong.
    rows = np.flatnonzero(test.manifest.label >= 0)
    views = np.zeros((len(rows), 1, classes), dtype=np.float32)
    has_features = np.isin(rows, decoded)
    places = {row: place for place, row in enumerate(rows.tolist())}
    views[[places[row] for row in decoded], 0] = classify.scores(train, test, classes).numpy()
    out.mkdir(exist_ok=True)
    test.manifest.save(out / "manifest.parquet")
    names = test.manifest.classes or [str(c) for c in range(classes)]
    predictions = Predictions(test.manifest.label[rows].astype(np.int64), has_features, views)
    reasons = failures(test.folder, test.manifest)
    return EvalResult(
        out, predictions, [test.manifest.name[row] for row in rows.tolist()], list(names), origin, reasons
    )


def knn_probe(neighbours: int) -> FeatureClassifier:
    """Create a classifier by the vote of the `neighbours` nearest training videos."""

    def scores(train: FeatureFolder, test: FeatureFolder, classes: int) -> Tensor:
        features, labels = train.whole()
        votes = nearest_neighbours(features, labels, test.whole()[0], classes=classes, neighbours=neighbours)
        return votes / votes.sum(1, keepdim=True)

    return FeatureClassifier("knn", scores)


def linear_probe(decay: float) -> FeatureClassifier:
    """Create a linear classifier on pooled features, with weight decay `decay`."""

    def scores(train: FeatureFolder, test: FeatureFolder, classes: int) -> Tensor:
        features, labels = train.whole()
        return linear_classifier(features, labels, test.whole()[0], classes=classes, decay=decay).softmax(1)

    return FeatureClassifier("linear", scores)


def attentive_probe(epochs: int, lr: float, device: torch.device) -> FeatureClassifier:
    """Create a classifier by an attentive head on all tokens, trained on `device`."""

    def scores(train: FeatureFolder, test: FeatureFolder, classes: int) -> Tensor:
        width = next(train.parts())[0].shape[-1]
        torch.manual_seed(0)
        heads = next(count for count in range(max(width // _HEAD, 1), 0, -1) if width % count == 0)
        head = AttentiveHead(width, heads, classes).to(device)
        tested = (features for features, _ in test.parts())
        return attentive_classifier(train.parts, tested, head, epochs=epochs, lr=lr).softmax(1)

    return FeatureClassifier("attentive", scores)
