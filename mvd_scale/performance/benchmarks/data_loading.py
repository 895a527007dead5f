"""`mvd-scale bench data`: clips/s of our data loader, compared with baseline loaders in common use."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.data.indexing.shards import save_manifest, shard_videos
from mvd_scale.data.indexing.transcode import TranscodeOptions
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import WHOLE_FILE, Manifest
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.performance.benchmarks.baselines.loaders import BASELINES, baseline_loader, unavailable_reason
from mvd_scale.performance.benchmarks.timing import run_in_subprocess, time_batches
from mvd_scale.performance.benchmarks.videos import generate_videos, load_or_index_videos
from mvd_scale.performance.report import Metric, Report, this_machine

BATCH = 8

_AHEAD = 4
"""Batches left over at the end: our loader prefetches when the timing begins, so it must also when the timing ends."""
OURS = "mvd-scale"
_PACKAGES = ("nvidia-dali-cuda130", "av", "decord", "torchcodec", "torchvision")


@dataclass(frozen=True)
class LoaderSpeed:
    """Speed of one loader on one set of videos."""

    videos: str
    source: str
    workers: int
    way: str
    clips_per_second: float
    cpu_seconds_per_clip: float


@dataclass(frozen=True, kw_only=True)
class DataReport(Report):
    """All figures of one run on one machine."""

    kind: Literal["data"] = "data"
    figures: list[LoaderSpeed]
    absent: dict[str, str]
    """Loaders that cannot run here, with the reason."""
    clips: int
    source: str | None
    """Source of the videos; None if they were generated."""

    def setting(self) -> dict[str, Any]:
        """Return the source of the videos and the number of timed clips."""
        return {"source": self.source, "clips": self.clips}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield speed and CPU time of every loader; only ours is judged."""
        for way in self.figures:
            name, ours = f"{way.videos}, {way.source}, {way.workers} workers, {way.way}", way.way == OURS
            yield f"{name}: clips/s", Metric(way.clips_per_second, more_is_better=True, judged=ours)
            yield f"{name}: CPU s/clip", Metric(way.cpu_seconds_per_clip, judged=ours)

    def to_text(self) -> str:
        """Format as a table, one line per loader; the last column is the speed of ours divided by that loader's."""
        lines = [f"16x224x224, {self.clips} clips each, batches of {BATCH}", self.machine.title(), ""]
        lines.append(
            f"{'videos':<16}{'source':<24}{'workers':>8}  {'way':<26}{'clips/s':>9}{'CPU s/clip':>12}{'ours':>8}"
        )
        ours = {(f.videos, f.workers): f for f in self.figures if f.way == OURS and f.source == "files"}
        for figure in self.figures:
            base = ours.get((figure.videos, figure.workers))
            ratio = f"{base.clips_per_second / figure.clips_per_second:.2f}x" if base and figure is not base else ""
            lines.append(
                f"{figure.videos:<16}{figure.source:<24}{figure.workers:>8}  {figure.way:<26}"
                f"{figure.clips_per_second:>9.2f}{figure.cpu_seconds_per_clip:>12.4f}{ratio:>8}"
            )
        lines += [f"not measured: {way} ({reason})" for way, reason in self.absent.items()]
        return "\n".join(lines)


def measure_data(source: str | None, work: Path, *, workers: Sequence[int], clips: int, large: bool) -> DataReport:
    """Time our loader and the baseline loaders on the same videos, each in a separate process.

    Args:
        source: a manifest or a source that can be indexed; if None, real pictures are encoded to videos of 10 s.
        work: folder for generated videos and shards; existing ones are reused.
        workers: numbers of worker processes to measure.
        clips: number of timed clips, after a warm-up of a quarter as many.
        large: without a source, also measure videos of 1280x720.
    """
    sets = _made_sets(work, large) if source is None else {"given": load_or_index_videos(source)}
    first = next(iter(sets.values()))
    absent = {
        way: reason for way in BASELINES if (reason := unavailable_reason(way, first.path[first.usable[0]])) is not None
    }
    figures = []
    for name, manifest in sets.items():
        videos, _, kind = name.partition(" / ")
        for count in workers:
            figures.append(_figure(videos, kind or "files", count, OURS, _time_ours, manifest, count, clips))
            if not kind and manifest.offset[0] == WHOLE_FILE:
                for way in BASELINES:
                    if way not in absent:
                        figures.append(_figure(videos, "files", count, way, _time_plain, way, manifest, count, clips))
    machine = this_machine(_device(), _PACKAGES)
    return DataReport(machine=machine, figures=figures, absent=absent, clips=clips, source=source)


def measure_memory(source: str | None, work: Path, clips: int) -> Iterator[tuple[int, float]]:
    """Load many small clips; yields ten times the number so far and the memory of all processes (USS), MiB."""
    manifest = (
        load_or_index_videos(source) if source is not None else generate_videos(work / "small", "libx264", (64, 48), 20)
    )
    data = DataConfig(clips_per_video=-(-clips // len(manifest.usable)), workers=1)
    model = ModelConfig(size="S", input_size=32)
    steps = clips // BATCH
    with _loader(manifest, data, model, steps) as loader:
        for number, _ in enumerate(loader, start=1):
            if number % max(steps // 10, 1) == 0:
                gc.collect()
                yield number * BATCH, _resident_mib()


def _figure(
    videos: str, source: str, workers: int, way: str, time_it: Callable[..., Any], *arguments: Any
) -> LoaderSpeed:
    rate, cpu = run_in_subprocess(time_it, *arguments)
    return LoaderSpeed(videos, source, workers, way, rate, cpu)


def _time_ours(manifest: Manifest, workers: int, clips: int) -> tuple[float, float]:
    warm_up = max(clips // 4 // BATCH, 1)
    repeats = -(-(clips + (warm_up + _AHEAD) * BATCH) // len(manifest.usable))
    data = DataConfig(workers=workers, clips_per_video=repeats)
    with _loader(manifest, data, ModelConfig(size="B"), warm_up + clips // BATCH + _AHEAD) as loader:
        return _time(loader, warm_up, clips // BATCH)


def _time_plain(way: str, manifest: Manifest, workers: int, clips: int) -> tuple[float, float]:
    rows = manifest.usable
    paths, frames = [manifest.path[row] for row in rows], manifest.frames[rows].tolist()
    batches = iter(baseline_loader(way, paths, frames, batch=BATCH, workers=workers))
    return _time(batches, max(clips // 4 // BATCH, 1), clips // BATCH)


def _time(batches: Iterator[Any], warm_up: int, steps: int) -> tuple[float, float]:
    """Measure clips per second, and CPU seconds per clip."""
    spent, cpu = time_batches(batches, warm_up, steps)
    return BATCH / spent, cpu / BATCH


def _loader(manifest: Manifest, data: DataConfig, model: ModelConfig, steps: int) -> ClipLoader:
    plan = BatchPlan(BATCH, BATCH, range(steps))
    return ClipLoader(manifest, data, model, 0, plan=plan, rank=DataRank(_device()))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _resident_mib() -> float:
    me = psutil.Process()
    return sum(process.memory_full_info().uss for process in (me, *me.children(recursive=True))) / 2**20


def _made_sets(work: Path, large: bool) -> dict[str, Manifest]:
    """Generate sets of videos of 10 s, by name; the part of a name after a slash is the kind of shards."""
    sets = {
        "h264 340x256": generate_videos(work / "h264", "libx264", (340, 256), 12),
        "vp9 340x256": generate_videos(work / "vp9", "libvpx-vp9", (340, 256), 12),
    }
    if large:
        sets["h264 1280x720"] = generate_videos(work / "large", "libx264", (1280, 720), 4)
    for kind, encoding in (("shards", None), ("shards, keyframes 16", TranscodeOptions(keyframes=16))):
        out = str(work / kind.replace(", ", "_").replace(" ", "_"))
        packed = shard_videos(sets["h264 340x256"], out, size=2_000_000, workers=1, encoding=encoding)
        save_manifest(packed, out)
        sets[f"h264 340x256 / {kind}"] = packed
    return sets
