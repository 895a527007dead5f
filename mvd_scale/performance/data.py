"""`mvd-scale bench data`: clips per second of the data path, beside the plain ways that people use today."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import av
import psutil
import torch

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.data.index import build_manifest
from mvd_scale.data.loader import ClipLoader
from mvd_scale.data.manifest import WHOLE_FILE, Manifest
from mvd_scale.data.reencode import Encoding
from mvd_scale.data.samples import sample_pictures
from mvd_scale.data.shards import save_manifest, shard_videos
from mvd_scale.performance.plain_loaders import WAYS, missing, plain_loader

BATCH = 8
OURS = "mvd-scale"


@dataclass(frozen=True)
class Figure:
    """One way over one set of videos."""

    videos: str
    source: str
    workers: int
    way: str
    clips_per_second: float
    cpu_seconds_per_clip: float


@dataclass(frozen=True)
class DataReport:
    """All figures of one run on one machine."""

    figures: list[Figure]
    absent: dict[str, str]
    """Ways that cannot be gone here, and why."""
    cores: int
    clips: int
    versions: dict[str, str]

    def to_json(self) -> str:
        """All fields, one object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_text(self) -> str:
        """A line for every way; the last column is how many times as fast ours is over the same videos."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"16x224x224, {self.clips} clips each, batches of {BATCH}, {self.cores} cores; {versions}", ""]
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
    """Time our loader and the plain ones over the same videos, each in a process of its own.

    Args:
        source: a manifest or whatever can be indexed; real pictures encoded anew into clips of 10 s if None.
        work: folder for videos and shards that are made; what is there is used again.
        workers: numbers of worker processes to try.
        clips: clips that are timed, after a quarter as many that are not.
        large: without a source, also measure 1280x720.
    """
    sets = _made_sets(work, large) if source is None else {"given": _given(source, work)}
    first = next(iter(sets.values()))
    absent = {way: reason for way in WAYS if (reason := missing(way, first.path[first.usable[0]])) is not None}
    figures = []
    for name, manifest in sets.items():
        videos, _, kind = name.partition(" / ")
        for count in workers:
            figures.append(_figure(videos, kind or "files", count, OURS, _time_ours, manifest, count, clips))
            if not kind and manifest.offset[0] == WHOLE_FILE:
                for way in WAYS:
                    if way not in absent:
                        figures.append(_figure(videos, "files", count, way, _time_plain, way, manifest, count, clips))
    packages = ("torch", "nvidia-dali-cuda130", "av", "decord", "torchcodec", "torchvision")
    return DataReport(
        figures=figures,
        absent=absent,
        cores=len(os.sched_getaffinity(0)),
        clips=clips,
        versions={package: version for package in packages if (version := _version(package))},
    )


def measure_memory(source: str | None, work: Path, clips: int) -> Iterator[tuple[int, float]]:
    """Draw many small clips, and yield ten times how many they were and the MiB of all processes together."""
    manifest = _given(source, work) if source is not None else _small_videos(work)
    data = DataConfig(clips_per_video=-(-clips // len(manifest.usable)), workers=1)
    model = ModelConfig(size="S", input_size=32)
    steps = clips // BATCH
    with _loader(manifest, data, model, steps) as loader:
        for number, _ in enumerate(loader, start=1):
            if number % max(steps // 10, 1) == 0:
                gc.collect()
                yield number * BATCH, _resident_mib()


def _figure(videos: str, source: str, workers: int, way: str, time_it: Callable[..., Any], *arguments: Any) -> Figure:
    # A process of its own: what one way leaves behind does not slow the next one down.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rate, cpu = pool.submit(time_it, *arguments).result()
    return Figure(videos, source, workers, way, rate, cpu)


def _time_ours(manifest: Manifest, workers: int, clips: int) -> tuple[float, float]:
    warm_up = max(clips // 4 // BATCH, 1)
    repeats = -(-(clips + (warm_up + 4) * BATCH) // len(manifest.usable))
    data = DataConfig(workers=workers, clips_per_video=repeats)
    with _loader(manifest, data, ModelConfig(size="B"), warm_up + clips // BATCH) as loader:
        return _time(loader, warm_up, clips // BATCH)


def _time_plain(way: str, manifest: Manifest, workers: int, clips: int) -> tuple[float, float]:
    rows = manifest.usable
    paths, frames = [manifest.path[row] for row in rows], manifest.frames[rows].tolist()
    batches = iter(plain_loader(way, paths, frames, batch=BATCH, workers=workers))
    return _time(batches, max(clips // 4 // BATCH, 1), clips // BATCH)


def _time(batches: Iterator[Any], warm_up: int, steps: int) -> tuple[float, float]:
    """Clips per second, and CPU seconds of this process and its children for a clip."""
    for _ in islice(batches, warm_up):
        pass
    cpu, started = _cpu_seconds(), time.perf_counter()
    done = sum(1 for _ in islice(batches, steps))
    spent, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    return done * BATCH / spent, cpu / (done * BATCH)


def _loader(manifest: Manifest, data: DataConfig, model: ModelConfig, steps: int) -> ClipLoader:
    return ClipLoader(
        manifest,
        data,
        model,
        0,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        start_step=0,
        total_steps=steps,
    )


def _cpu_seconds() -> float:
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def _resident_mib() -> float:
    me = psutil.Process()
    return sum(process.memory_full_info().uss for process in (me, *me.children(recursive=True))) / 2**20


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _given(source: str, work: Path) -> Manifest:
    if source.endswith(".parquet"):
        return Manifest.load(source)
    return build_manifest(source, workers=len(os.sched_getaffinity(0)))


def _made_sets(work: Path, large: bool) -> dict[str, Manifest]:
    """Videos of 10 s by name; a name may say after a slash that they lie in shards."""
    sets = {
        "h264 340x256": _made(work / "h264", "libx264", (340, 256), 12),
        "vp9 340x256": _made(work / "vp9", "libvpx-vp9", (340, 256), 12),
    }
    if large:
        sets["h264 1280x720"] = _made(work / "large", "libx264", (1280, 720), 4)
    for kind, encoding in (("shards", None), ("shards, keyframes 16", Encoding(keyframes=16))):
        out = str(work / kind.replace(", ", "_").replace(" ", "_"))
        packed = shard_videos(sets["h264 340x256"], out, size=2_000_000, workers=1, encoding=encoding)
        save_manifest(packed, out)
        sets[f"h264 340x256 / {kind}"] = packed
    return sets


def _made(folder: Path, encoder: str, size: tuple[int, int], count: int) -> Manifest:
    """Real pictures, to and fro for 300 frames at 30 per second, by the encoder's own settings."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".webm" if "vpx" in encoder else ".mp4"
    for number in range(count):
        path = folder / f"{number:02d}{suffix}"
        if not path.exists():
            _encode(path, encoder, size, start=20 * number)
    return build_manifest(folder, workers=1)


def _small_videos(work: Path) -> Manifest:
    return _made(work / "small", "libx264", (64, 48), 20)


def _encode(path: Path, encoder: str, size: tuple[int, int], start: int) -> None:
    width, height = size
    pictures = sample_pictures("bikes.mp4")
    there_and_back = cycle([*range(len(pictures)), *reversed(range(len(pictures)))])
    partial = path.with_name(f".{path.name}")
    with av.open(str(partial), "w", format="webm" if path.suffix == ".webm" else "mp4") as container:
        stream = container.add_stream(encoder, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if "vpx" in encoder:
            stream.options = {"deadline": "realtime", "cpu-used": "6", "crf": "32", "b": "0"}
        for number, picture in enumerate(islice(there_and_back, start, start + 300)):
            frame = av.VideoFrame.from_ndarray(pictures[picture], format="rgb24")
            frame = frame.reformat(width=width, height=height, format="yuv420p", interpolation="AREA")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(path)
