"""`mvd-scale report`: a finished evaluation as one self-contained HTML page, without network access and scripts.

All names in an evaluation (classes, files, paths) are untrusted; the template escapes them.

Legend: X videos, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.manifest import Manifest
from mvd_scale.data.storage import DecodeError
from mvd_scale.evaluation.results import EvalResult
from mvd_scale.utils.io import write_atomic
from mvd_scale.visualization.page import render_page
from mvd_scale.visualization.svg import confidences, heat_map, reliability
from mvd_scale.visualization.thumbnails import thumbnails

TABLE = 20
"""Largest number of classes for which tables list all of them; for more, the confusion matrix is a heat map."""

HARDEST = 8
"""Number of hard videos of each kind, unless another one is asked for."""

_LISTED = 10
"""Number of classes, and of pairs of classes, that are listed if there are too many for full tables."""


@dataclass(frozen=True)
class ClassResult:
    """One class that has videos."""

    name: str
    videos: int
    accuracy: float
    taken_for: str
    """Name of the other class that was predicted most often for its videos; empty if there is none."""


@dataclass(frozen=True)
class Confusion:
    """Number of videos of one class for which another class was predicted."""

    label: str
    prediction: str
    videos: int
    share: float
    """Share of the videos of the class, 0 to 1."""


@dataclass(frozen=True)
class HardVideo:
    """Video with a confident wrong prediction or with a low score of its class."""

    name: str
    label: str
    label_score: float
    prediction: str
    prediction_score: float
    pictures: list[str]
    """Thumbnails as `data:` URLs; empty if the video cannot be decoded any more."""

    missing: str
    """Reason why there are no thumbnails."""


def write_report(folder: Path, out: Path, *, hardest: int = HARDEST) -> None:
    """Write the page of an evaluation.

    Args:
        folder: folder that `evaluate`, `ensemble` or `probe` wrote.
        out: HTML file to write.
        hardest: number of hard videos to show of each kind.

    Raises:
        UserError: the folder holds no finished evaluation, or its manifest is missing.
    """
    tested = EvalResult.load(folder)
    manifest = Manifest.load(folder / "manifest.parquet")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, render(tested, manifest, hardest=hardest))


def render(tested: EvalResult, manifest: Manifest, *, hardest: int) -> str:
    """Render the page of an evaluation on the videos of a manifest, with `hardest` hard videos of each kind."""
    predictions = tested.predictions
    confusion = predictions.confusion
    classes = class_results(tested)
    few = len(tested.classes) <= TABLE
    picture, span = ("", 1) if few else heat_map(confusion[:, :-1])
    sure, low = hard_videos(tested, manifest, hardest)
    return render_page(
        "report.html",
        origin=tested.origin,
        figures=tested.figures(),
        reliability=reliability(predictions),
        confidences=confidences(predictions),
        views=list(zip(tested.origin.views, predictions.view_accuracy.tolist(), strict=True)),
        top1=predictions.top(1),
        class_names=tested.classes,
        classes=classes,
        empty=len(tested.classes) - len(classes),
        few=few,
        listed=_LISTED,
        matrix=_matrix(tested) if few else [],
        heat_map=picture,
        span=span,
        confusions=confusions(tested)[:_LISTED],
        sure=sure,
        low=low,
        failures=[(name, reason) for _, name, reason in tested.failures()],
    )


def class_results(tested: EvalResult) -> list[ClassResult]:
    """List the classes that have videos, ordered by accuracy, the worst first; of equal ones the larger class first."""
    confusion, accuracy = tested.predictions.confusion, tested.predictions.class_accuracy
    videos = confusion.sum(1)
    beside = _beside(confusion)
    found = np.flatnonzero(videos)
    return [
        ClassResult(
            tested.classes[c],
            int(videos[c]),
            float(accuracy[c]),
            tested.classes[int(beside[c].argmax())] if beside[c].any() else "",
        )
        for c in found[np.lexsort((-videos[found], accuracy[found]))].tolist()
    ]


def confusions(tested: EvalResult) -> list[Confusion]:
    """List all pairs of classes that were confused, the most frequent first."""
    table = tested.predictions.confusion
    beside, videos = _beside(table), table.sum(1)
    labels, predicted_classes = np.nonzero(beside)
    counts = beside[labels, predicted_classes]
    order = np.lexsort((-counts / videos[labels], -counts))
    return [
        Confusion(
            tested.classes[label], tested.classes[prediction], int(table[label, prediction]),
            float(table[label, prediction] / videos[label]),
        )
        for label, prediction in zip(labels[order].tolist(), predicted_classes[order].tolist(), strict=True)
    ]  # fmt: skip


def hard_videos(tested: EvalResult, manifest: Manifest, count: int) -> tuple[list[HardVideo], list[HardVideo]]:
    """Select hard videos among the decoded ones.

    Returns:
        `count` videos with the highest scores of wrong predictions, and `count` of the other videos with the lowest
        scores of their true class.
    """
    predictions = tested.predictions
    scores, predicted_classes = predictions.scores, predictions.predicted
    own = np.take_along_axis(scores, predictions.labels[:, None], 1)[:, 0]
    wrong = np.flatnonzero(predictions.decoded & (predicted_classes != predictions.labels))
    sure = wrong[np.argsort(-scores[wrong].max(1), kind="stable")][:count]
    others = np.setdiff1d(np.flatnonzero(predictions.decoded), sure)
    low = others[np.argsort(own[others], kind="stable")][:count]
    rows = np.flatnonzero(manifest.label >= 0)

    def show(video: int) -> HardVideo:
        label, prediction = int(predictions.labels[video]), int(predicted_classes[video])
        pictures, missing = [], ""
        try:
            pictures = thumbnails(manifest.row(int(rows[video])))
        except DecodeError as error:
            missing = error.reason
        return HardVideo(
            tested.names[video],
            tested.classes[label],
            float(own[video]),
            tested.classes[prediction],
            float(scores[video, prediction]),
            pictures,
            missing,
        )

    return [show(video) for video in sure.tolist()], [show(video) for video in low.tolist()]


def _matrix(tested: EvalResult) -> list[tuple[str, list[tuple[int, float]]]]:
    """Make the rows of the confusion matrix: the label, then number and share of its videos for each prediction."""
    table = tested.predictions.confusion
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    return [
        (name, list(zip(counts, parts, strict=True)))
        for name, counts, parts in zip(tested.classes, table.tolist(), shares.tolist(), strict=True)
    ]


def _beside(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the confusion matrix (C, C + 1) without its diagonal and its column of videos not decoded: (C, C)."""
    beside = confusion[:, :-1].copy()
    np.fill_diagonal(beside, 0)
    return beside
