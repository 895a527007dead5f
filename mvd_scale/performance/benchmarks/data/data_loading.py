"""`mvd-scale bench data`: clips/s of our data loader beside baseline loaders, and where a clip's time goes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import psutil
import torch

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.data.indexing.shards import save_manifest, shard_videos
from mvd_scale.data.indexing.transcode import TranscodeOptions
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import WHOLE_FILE, Manifest
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.performance.benchmarks.data.baselines.ffmpeg import lend_ffmpeg
from mvd_scale.performance.benchmarks.data.baselines.loaders import (
    BASELINES,
    Requests,
    baseline_batches,
)
from mvd_scale.performance.benchmarks.data.clip_stages import ClipStages, measure_stages
from mvd_scale.performance.benchmarks.data.turns import Contest, Turn, take_turns
from mvd_scale.performance.benchmarks.data.videos import generate_videos, load_or_index_videos
from mvd_scale.performance.benchmarks.timing import run_in_subprocess
from mvd_scale.performance.report import Metric, Report, this_machine

BATCH = 8

OURS = "mvd-scale"

MAX_DIFFERENCE = 4.0
"""Largest mean difference in levels of 255 between a loader's first batch and PyAV's frames with our geometry."""

_PACKAGES = ("nvidia-dali-cuda130", "av", "spdl-io", "decord2", "decord", "torchcodec", "torchvision")

_STEPS = 1_000_000
"""Steps of a loader that is timed: it is closed before."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class LoaderSpeed:
    """Speed of one loader on one set of videos."""

    videos: str
    source: str
    workers: int
    way: str
    clips_per_second: float
    """Median of the rounds."""
    cpu_seconds_per_clip: float
    """Median of the rounds."""
    lead: float | None = None
    """Speed of ours on files divided by that of this loader, in the same round: median of the rounds."""


@dataclass(frozen=True, kw_only=True)
class DataReport(Report):
    """All figures of one run on one machine."""

    kind: Literal["data"] = "data"
    figures: list[LoaderSpeed]
    stages: list[ClipStages]
    absent: dict[str, str]
    """Loaders that cannot run here, or that failed, each with the videos and the number of workers, and the reason."""
    rounds: int
    seconds: float
    """Length of a turn."""
    source: str | None
    """Source of the videos; None if they were generated."""

    def setting(self) -> dict[str, Any]:
        """Return the source of the videos, and number and length of the turns."""
        return {"source": self.source, "rounds": self.rounds, "seconds": self.seconds}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield speed and CPU time of every loader; only ours is judged."""
        for way in self.figures:
            name, ours = f"{way.videos}, {way.source}, {way.workers} workers, {way.way}", way.way == OURS
            yield f"{name}: clips/s", Metric(way.clips_per_second, more_is_better=True, judged=ours)
            yield f"{name}: CPU s/clip", Metric(way.cpu_seconds_per_clip, judged=ours)

    def to_text(self) -> str:
        """Format as two tables: a line per loader, whose last column is the lead of ours, and the stages of a clip."""
        lines = [
            f"16x224x224, batches of {BATCH}, {self.rounds} turns of {self.seconds:g} s each",
            self.machine.title(),
            "",
            f"{'videos':<16}{'source':<24}{'workers':>8}  {'way':<26}{'clips/s':>9}{'CPU s/clip':>12}{'ours':>8}",
        ]
        for figure in self.figures:
            lead = "" if figure.lead is None else f"{figure.lead:.2f}x"
            lines.append(
                f"{figure.videos:<16}{figure.source:<24}{figure.workers:>8}  {figure.way:<26}"
                f"{figure.clips_per_second:>9.2f}{figure.cpu_seconds_per_clip:>12.4f}{lead:>8}"
            )
        lines += [f"not measured: {way} ({reason})" for way, reason in self.absent.items()]
        return "\n".join([*lines, "", *ClipStages.table(self.stages)])


def measure_data(
    source: str | None,
    work: Path,
    *,
    workers: Sequence[int],
    rounds: int,
    seconds: float,
    large: bool,
    say: Say,
) -> DataReport:
    """Time our loader and the baseline loaders on the same clips, in turns.

    Args:
        source: a manifest or a source that can be indexed; if None, real pictures are encoded to videos of 10 s.
        work: folder for generated videos and shards; existing ones are reused.
        workers: numbers of workers to measure.
        rounds: number of turns of each loader.
        seconds: least length of a turn in seconds.
        large: without a source, also measure videos of 1280x720.
        say: called with each line of progress.
    """
    say("preparing the videos")
    sets = _made_sets(work, large) if source is None else {"given": {"files": load_or_index_videos(source)}}
    figures, stages, absent = list[LoaderSpeed](), list[ClipStages](), dict[str, str]()
    with lend_ffmpeg(work):
        for videos, sources in sets.items():
            for count in workers:
                say(f"{videos}, {count} workers")
                measured, failed = _measure_set(videos, sources, count, rounds, seconds, say)
                figures += measured
                absent |= {f"{way}, {videos}, {count} workers": reason for way, reason in failed.items()}
            # None where ours failed on files.
            ours = (each for each in figures if (each.videos, each.source, each.way) == (videos, "files", OURS))
            slowest = max((figure.cpu_seconds_per_clip for figure in ours), default=0.0)
            stages.append(run_in_subprocess(measure_stages, videos, _requests(sources["files"]), slowest))
    machine = this_machine(_device(), _PACKAGES)
    return DataReport(
        machine=machine, figures=figures, stages=stages, absent=absent, rounds=rounds, seconds=seconds, source=source
    )


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


def _measure_set(
    videos: str, sources: dict[str, Manifest], workers: int, rounds: int, seconds: float, say: Say
) -> tuple[list[LoaderSpeed], dict[str, str]]:
    """Time all loaders on one set of videos: figures, and the reasons why some have none."""
    requests = _requests(sources["files"])
    checks = {source: partial(check_batch, _requests(manifest)) for source, manifest in sources.items()}
    entries = {(source, OURS): partial(_our_batches, manifest, workers) for source, manifest in sources.items()}
    if sources["files"].offset[0] == WHOLE_FILE:
        baselines = {way: partial(baseline_batches, way, requests, batch=BATCH, workers=workers) for way in BASELINES}
        entries |= {("files", way): work for way, work in baselines.items()}
    names = {f"{way} on {source}" if source != "files" else way: (source, way) for source, way in entries}
    contest = take_turns(
        {name: (entries[key], checks[key[0]]) for name, key in names.items()},
        rounds=rounds,
        seconds=seconds,
        say=say,
    )
    return _speeds(videos, workers, names, contest), contest.failed


def _speeds(videos: str, workers: int, names: dict[str, tuple[str, str]], contest: Contest) -> list[LoaderSpeed]:
    ours, figures = contest.turns.get(OURS), []
    for name, turns in contest.turns.items():
        source, way = names[name]
        rate = BATCH * median(turn.batches / turn.seconds for turn in turns)
        cpu = median(turn.cpu / turn.batches for turn in turns) / BATCH
        lead = median(map(_lead, ours, turns)) if ours is not None and name != OURS else None
        figures.append(LoaderSpeed(videos, source, workers, way, rate, cpu, lead))
    return figures


def _lead(ours: Turn, theirs: Turn) -> float:
    return ours.batches / ours.seconds * theirs.seconds / theirs.batches


def check_batch(requests: Requests, batch: tuple[Any, Any, Any]) -> None:
    """Check that a loader's first batch has the clips, frames, crops, flips and masks that all loaders must have.

    Raises:
        ValueError: it does not.
    """
    pixels, visible, masked = (np.asarray(array) for array in batch)
    expected = [requests[n] for n in range(BATCH)]
    if not np.array_equal(visible, np.stack([each.visible for each in expected])) or not np.array_equal(
        masked, np.stack([each.masked for each in expected])
    ):
        raise ValueError("its first batch has other masks")
    reference = np.stack([requests.reference(n) for n in range(BATCH)])
    if pixels.dtype != np.uint8 or pixels.shape != reference.shape:
        raise ValueError(f"its first batch is {pixels.dtype} {pixels.shape}, expected uint8 {reference.shape}")
    difference = float(np.abs(pixels.astype(np.int16) - reference).mean())
    if difference > MAX_DIFFERENCE:
        raise ValueError(f"its first batch differs by {difference:.1f} levels on average: other frames or crops")


def _requests(manifest: Manifest) -> Requests:
    return Requests(manifest, _data(0), ModelConfig(size="B"), BATCH)


def _data(workers: int) -> DataConfig:
    return DataConfig(workers=workers, clips_per_video=BATCH)  # an epoch of one video has a batch


def _our_batches(manifest: Manifest, workers: int) -> Generator[tuple[Any, Any, Any]]:
    with _loader(manifest, _data(workers), ModelConfig(size="B"), _STEPS) as loader:
        for batch in loader:
            yield batch.pixels.cpu(), batch.visible.cpu(), batch.masked.cpu()


def _loader(manifest: Manifest, data: DataConfig, model: ModelConfig, steps: int) -> ClipLoader:
    plan = BatchPlan(BATCH, BATCH, range(steps))
    return ClipLoader(manifest, data, model, 0, plan=plan, rank=DataRank(_device()))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _resident_mib() -> float:
    me = psutil.Process()
    return sum(process.memory_full_info().uss for process in (me, *me.children(recursive=True))) / 2**20


def _made_sets(work: Path, large: bool) -> dict[str, dict[str, Manifest]]:
    """Generate sets of videos of 10 s: by name, then by their source, files or shards."""
    small = generate_videos(work / "h264", "libx264", (340, 256), 8)
    sets = {
        "h264 340x256": {"files": small},
        "vp9 340x256": {"files": generate_videos(work / "vp9", "libvpx-vp9", (340, 256), 4)},
    }
    if large:
        sets["h264 1280x720"] = {"files": generate_videos(work / "large", "libx264", (1280, 720), 2)}
    out = str(work / "shards_keyframes_16")
    packed = shard_videos(small, out, size=2_000_000, workers=1, encoding=TranscodeOptions(keyframes=16))
    save_manifest(packed, out)
    sets["h264 340x256"]["shards, keyframes 16"] = packed
    return sets
