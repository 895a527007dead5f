"""`mvd-scale bench eval`: videos/s of the multi-view evaluation, compared with baseline loaders in common use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.config.training import FrozenPrecision
from mvd_scale.data.loaders.view_loader import ViewLoader, ViewShape, view_items
from mvd_scale.data.manifest import WHOLE_FILE, Manifest
from mvd_scale.data.sampling.eval_views import view_frame_indices
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError
from mvd_scale.evaluation.scorer import ClipScorer
from mvd_scale.models import Classifier
from mvd_scale.models.precision import usual_precision
from mvd_scale.performance.benchmarks.data.baselines.views import (
    BASELINES,
    Baseline,
    baseline_views,
    frames_decoded,
    reader_name,
)
from mvd_scale.performance.benchmarks.data.videos import generate_videos, load_or_index_videos
from mvd_scale.performance.benchmarks.timing import run_in_subprocess, time_batches
from mvd_scale.performance.report import Metric, Report, this_machine

OURS = "mvd-scale"
VIEWS = ViewsConfig()
FRAMES, SIDE, CLASSES = 16, 224, 400

_TITLES: dict[str, str] = {"view": "view by view", "clip": "clip by clip", "whole": "view by view, all frames"}
_WARM_UP, _AHEAD = 4, 4
"""Videos loaded before the timing begins and left over when it ends: every loader prefetches at most so many."""


@dataclass(frozen=True)
class EvalSpeed:
    """Speed of one loader; all loaders have the same videos."""

    part: str
    """`data`: views are loaded; `test`: views are loaded and classified."""

    way: str
    videos_per_second: float
    cpu_seconds_per_video: float
    frames_decoded: float
    """Mean number of decoded frames per video; for our loader an upper bound, as it skips unreferenced frames."""


@dataclass(frozen=True, kw_only=True)
class EvalReport(Report):
    """All figures of one run on one machine."""

    kind: Literal["eval"] = "eval"
    figures: list[EvalSpeed]
    source: str | None
    """Source of the videos; None if they were generated."""
    size: str
    videos: int
    workers: int
    precision: str
    """Precision of our classifier."""
    plain_precision: str
    """Precision of the classifier that the baselines use."""
    views: str
    reader: str

    def setting(self) -> dict[str, Any]:
        """Return videos, classifier, views and conditions of loading."""
        keys = ("source", "size", "videos", "workers", "precision", "plain_precision", "views", "reader")
        return {key: getattr(self, key) for key in keys}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield speed and CPU time of every loader; only ours is judged."""
        for way in self.figures:
            name, ours = f"{way.part}, {way.way}", way.way == OURS
            yield f"{name}: videos/s", Metric(way.videos_per_second, more_is_better=True, judged=ours)
            yield f"{name}: CPU s/video", Metric(way.cpu_seconds_per_video, judged=ours)

    def to_text(self) -> str:
        """Format as a table, one line per loader; the last column is the speed of ours divided by that loader's."""
        lines = [
            f"{self.views}, {FRAMES}x{SIDE}x{SIDE}, {self.videos} videos, {self.workers} workers; "
            f"ours in {self.precision}, baselines in {self.plain_precision}, read by {self.reader}",
            self.machine.title(),
            "",
            f"{'part':<14}{'way':<28}{'videos/s':>10}{'CPU s/video':>13}{'frames decoded':>16}{'ours':>9}",
        ]
        ours = {figure.part: figure for figure in self.figures if figure.way == OURS}
        for figure in self.figures:
            base = ours[figure.part]
            ratio = "" if figure is base else f"{base.videos_per_second / figure.videos_per_second:.2f}x"
            part = "data" if figure.part == "data" else f"test, ViT-{self.size}"
            lines.append(
                f"{part:<14}{figure.way:<28}{figure.videos_per_second:>10.3f}{figure.cpu_seconds_per_video:>13.3f}"
                f"{figure.frames_decoded:>16.0f}{ratio:>9}"
            )
        return "\n".join(lines)


def measure_evaluation(
    source: str | None, work: Path, *, videos: int, size: str | None, precision: FrozenPrecision | None, workers: int
) -> EvalReport:
    """Time our loader of evaluation views and the baselines on the same videos, each in a separate process.

    Args:
        source: a manifest or a source of files to index; if None, real pictures are encoded to 10 s of H.264.
        work: folder for generated videos; existing ones are reused.
        videos: number of timed videos, after a warm-up; the files are repeated if there are fewer.
        size: also time the evaluation with a classifier of this size and random weights; None for loading only.
        precision: precision of our classifier; if None the usual one of the device, which the baselines also have.
        workers: worker processes of each loader.

    Raises:
        UserError: the source has no usable video that is a separate file.
    """
    manifest = (
        generate_videos(work / "h264", "libx264", (340, 256), videos)
        if source is None
        else load_or_index_videos(source)
    )
    rows = manifest.usable[(manifest.offset[manifest.usable] == WHOLE_FILE)][:videos]
    if not len(rows):
        raise UserError(f"{source} has no usable video in a file of its own, which the baseline loaders need")
    totals = manifest.frames[rows]
    once = float(np.mean([view_frame_indices(VIEWS, int(total), frames=FRAMES).max() + 1 for total in totals]))
    figures = []
    usual = usual_precision(_device())
    for part, model in [("data", None), *([("test", size)] if size is not None else [])]:
        spent, cpu = run_in_subprocess(_time_ours, manifest, rows, videos, workers, model, precision or usual)
        figures.append(EvalSpeed(part, OURS, 1 / spent, cpu, once))
        for way in BASELINES:
            spent, cpu = run_in_subprocess(_time_plain, way, manifest, rows, videos, workers, model, usual)
            counts = [frames_decoded(way, int(total), VIEWS, length=FRAMES) for total in totals]
            figures.append(EvalSpeed(part, _TITLES[way], 1 / spent, cpu, float(np.mean(counts))))
    return EvalReport(
        machine=this_machine(_device(), ("nvidia-dali-cuda130", "av", "decord", "torchvision")),
        figures=figures,
        source=source,
        size=size or "none",
        videos=videos,
        workers=workers,
        precision=precision or usual,
        plain_precision=usual,
        views=f"{VIEWS.clips} x {VIEWS.crops} {VIEWS.sampling} views, stride {VIEWS.stride}",
        reader=reader_name(),
    )


def _time_ours(
    manifest: Manifest,
    rows: NDArray[np.int64],
    videos: int,
    workers: int,
    size: str | None,
    precision: FrozenPrecision,
) -> tuple[float, float]:
    data = DataConfig(workers=workers)
    items = view_items(manifest, VIEWS, frames=FRAMES)
    chosen = np.resize(items[np.isin(items[:, 0], rows)], (_loaded(videos), 2))
    shape, rank = ViewShape(FRAMES, SIDE), DataRank(_device())
    loader = ViewLoader(manifest, data, VIEWS, chosen, shape=shape, batch=1, rank=rank)
    with loader:
        views = (clips.flatten(0, 1) for batch in loader for clips in batch.pixels)
        return time_batches(_used(views, size, precision), _WARM_UP, videos)


def _time_plain(
    way: Baseline,
    manifest: Manifest,
    rows: NDArray[np.int64],
    videos: int,
    workers: int,
    size: str | None,
    precision: FrozenPrecision,
) -> tuple[float, float]:
    again = np.resize(rows, _loaded(videos))
    paths, frames = [manifest.path[row] for row in again.tolist()], manifest.frames[again].tolist()
    views = iter(baseline_views(way, paths, frames, VIEWS, length=FRAMES, side=SIDE, workers=workers))
    times = time_batches(_used(views, size, precision), _WARM_UP, videos)
    # Exhaust the loader, because worker processes that are stopped in the middle of a batch print errors.
    for _ in views:
        pass
    return times


def _loaded(videos: int) -> int:
    """Number of videos to load, so that a loader that prefetches when the timing begins still does when it ends."""
    return _WARM_UP + videos + _AHEAD


def _used(videos: Iterator[Tensor], size: str | None, precision: FrozenPrecision) -> Iterator[Tensor]:
    """Yield the views of each video; or, with a size, the scores of a classifier with random weights for them."""
    device = _device()
    if size is None:
        for views in videos:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield views
    else:
        model = ModelConfig.model_validate({"size": size, "frames": FRAMES, "input_size": SIDE})
        score = ClipScorer(Classifier(model, CLASSES), device, precision)
        for views in videos:
            yield score(views.to(device)).cpu()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
