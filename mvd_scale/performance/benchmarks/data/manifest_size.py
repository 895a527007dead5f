"""`mvd-scale bench manifest`: private memory of processes and seconds to the first batch, by rows of the manifest."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import torch

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.data.columns import BLOCK, encode_texts
from mvd_scale.data.indexing.build import ProbeTask, VideoProber, build_manifest, index_videos, merge
from mvd_scale.data.indexing.shards import plan_shards, save_manifest, shard_videos
from mvd_scale.data.indexing.sources import list_paths
from mvd_scale.data.indexing.statistics import Statistics
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import SCHEMA, Manifest, Row
from mvd_scale.data.spool import store_sorted
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.performance.benchmarks.data.videos import encode_pictures
from mvd_scale.performance.benchmarks.timing import run_in_subprocess
from mvd_scale.performance.report import Metric, Report, this_machine

BATCH = 8

FEW = 1000
"""Rows of the manifest with which the others are compared: what its processes hold is not the manifest."""

_MORE = 10
"""Batches after the first one, while memory is measured: pages that clips touch would add up."""

_VIDEOS = (("libx264", (64, 48)), ("libx264", (80, 64)), ("libvpx-vp9", (64, 48)), ("libvpx-vp9", (96, 64)))
_FRAMES = 64
_DIGITS = 8
_SHARD = 1_000_000_000
_INTERVAL = 0.05
"""Seconds between two readings of the memory of all processes."""


@dataclass(frozen=True)
class Start:
    """Start of a loader, and what its processes hold while it loads some batches."""

    rows: int
    start: Literal["first", "later"]
    """Whether columns and order of the epoch are made, or found."""
    workers: int
    seconds: float
    """Seconds from the path of the manifest to the first batch."""
    rank_mib: float
    """Most private memory (USS) of the rank, MiB."""
    worker_mib: float
    """Most private memory (USS) of a worker, MiB; 0 without workers."""


@dataclass(frozen=True)
class Size:
    """Sizes of the files of one manifest, MiB."""

    rows: int
    parquet_mib: float
    columns_mib: float
    """Files that the processes of a host map: columns and order of one epoch."""


@dataclass(frozen=True)
class Command:
    """A command of `mvd-scale data` on one manifest."""

    rows: int
    name: str
    seconds: float
    most_mib: float
    """Most private memory (USS) of its process, MiB."""
    more_mib: float
    """Difference of `most_mib` to the private memory before the command, MiB."""
    worker_mib: float
    """Most private memory (USS) of a worker, MiB; 0 without workers."""


@dataclass(frozen=True, kw_only=True)
class ManifestReport(Report):
    """All figures of one run on one machine."""

    kind: Literal["manifest"] = "manifest"
    starts: list[Start]
    sizes: list[Size]
    commands: list[Command]

    def setting(self) -> dict[str, Any]:
        """Return the numbers of rows and workers."""
        return {"rows": [size.rows for size in self.sizes], "workers": sorted({start.workers for start in self.starts})}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield seconds and memory of every start and every command."""
        for start in self.starts:
            name = f"{start.rows} rows, {start.start} start, {start.workers} workers"
            yield f"{name}: s to the first batch", Metric(start.seconds)
            yield f"{name}: MiB of the rank", Metric(start.rank_mib)
            if start.workers:
                yield f"{name}: MiB of a worker", Metric(start.worker_mib)
        for command in self.commands:
            name = f"{command.rows} rows, data {command.name}"
            yield f"{name}: s", Metric(command.seconds)
            yield f"{name}: MiB", Metric(command.most_mib)

    def to_text(self) -> str:
        """Format as three tables; memory also as the difference from a manifest of `FEW` rows."""
        few = {(start.start, start.workers): start for start in self.starts if start.rows == FEW}
        lines = [
            self.machine.title(),
            "private memory (USS), the most of a process; in brackets more than with 1,000 rows",
        ]
        lines += [
            "",
            f"{'rows':>10} {'start':<6}{'workers':>8}{'s to first batch':>18}{'rank MiB':>18}{'worker MiB':>18}",
        ]
        for start in self.starts:
            base = few[start.start, start.workers]
            rank = f"{start.rank_mib:.0f} ({start.rank_mib - base.rank_mib:+.0f})"
            worker = f"{start.worker_mib:.0f} ({start.worker_mib - base.worker_mib:+.0f})" if start.workers else ""
            lines.append(
                f"{start.rows:>10} {start.start:<6}{start.workers:>8}{start.seconds:>18.1f}{rank:>18}{worker:>18}"
            )
        lines += ["", f"{'rows':>10}{'Parquet MiB':>13}{'mapped MiB':>12}"]
        for size in self.sizes:
            lines.append(f"{size.rows:>10}{size.parquet_mib:>13.1f}{size.columns_mib:>12.1f}")
        lines += ["", f"{'rows':>10} {'command':<16}{'s':>8}{'most MiB':>10}{'by the command':>16}{'worker MiB':>12}"]
        for command in self.commands:
            worker = f"{command.worker_mib:.0f}" if command.worker_mib else ""
            lines.append(
                f"{command.rows:>10} {command.name:<16}{command.seconds:>8.1f}{command.most_mib:>10.0f}"
                f"{command.more_mib:>16.0f}{worker:>12}"
            )
        return "\n".join(lines)


def measure_manifest(rows: Sequence[int], workers: Sequence[int], work: Path) -> ManifestReport:
    """Load the first batches by manifests of some numbers of rows, each time in a new process.

    Args:
        rows: numbers of rows; `FEW` is measured as well.
        workers: numbers of worker processes.
        work: folder for videos, manifests and the files that processes map; existing manifests are reused.
    """
    starts, sizes, commands = [], [], []
    for count in sorted({FEW, *rows}):
        path = make_manifest(work, count)
        for number in workers:
            # Files that an earlier start made would make this one a later start.
            cache = work / "mapped"
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir()
            for start in ("first", "later"):
                memory = run_in_subprocess(_measure_start, str(path), number, str(cache))
                starts.append(Start(count, start, number, *memory))
        mapped = sum(file.stat().st_size for file in cache.rglob("*.columns"))
        sizes.append(Size(count, path.stat().st_size / 2**20, mapped / 2**20))
        for name in COMMANDS:
            if count <= MOST_ROWS.get(name, count):
                figures = run_in_subprocess(_measure_command, name, str(path), str(cache))
                commands.append(Command(count, name, *figures))
    machine = this_machine(torch.device("cpu"))
    return ManifestReport(machine=machine, starts=starts, sizes=sizes, commands=commands)


def make_manifest(work: Path, rows: int) -> Path:
    """Write a manifest of a number of rows whose paths all differ, though they lead to four videos; and, for `data
    merge`, the same as the only part of its source.

    Each folder of links leads to itself, so that the digits of a number are a path.
    """
    path = work / f"{rows}.parquet"
    if path.is_file():
        return path
    folder = work / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    for digit in range(10):
        if not (folder / str(digit)).is_symlink():
            (folder / str(digit)).symlink_to(".")
    pictures = np.random.default_rng(0).integers(0, 256, (_FRAMES, 48, 64, 3), np.uint8)
    files = [folder / f"{k}{'.webm' if 'vpx' in encoder else '.mp4'}" for k, (encoder, _) in enumerate(_VIDEOS)]
    for file, (encoder, size) in zip(files, _VIDEOS, strict=True):
        if not file.exists():
            encode_pictures(file, encoder, size, pictures)
    videos = build_manifest([str(file) for file in files], workers=1).rows
    manifest = Manifest.from_chunks(lambda name: _column(name, rows, videos), rows, source=str(work))
    replace(manifest, part=(1, 1)).save(_part_of(path))
    manifest.save(path)
    return path


def _column(name: str, rows: int, videos: Sequence[Row]) -> Iterator[pa.Array]:
    """Column of a manifest: that of the videos in turn, but for values that differ in any real manifest."""
    for start in range(0, rows, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, rows))
        if name == "name":
            yield encode_texts(f"{number // 1000:05d}/{number:0{_DIGITS}d}.mp4" for number in numbers.tolist())
        elif name == "path":
            ends = [os.path.split(video.path) for video in videos]
            yield encode_texts(
                f"{ends[k % len(ends)][0]}/{'/'.join(f'{k:0{_DIGITS}d}')}/{ends[k % len(ends)][1]}"
                for k in numbers.tolist()
            )
        elif name in ("size", "keyframe_interval", "label"):
            yield pa.array(numbers * 7919 % {"size": 1_000_003, "keyframe_interval": 241, "label": 400}[name])
        elif name == "duration":
            yield pa.array(2 + numbers * 7919 % 10007 / 1000)
        elif name == "frames":
            yield pa.array(_FRAMES - numbers % 13)
        else:
            values = pa.array([getattr(video, name) for video in videos], SCHEMA.field(name).type)
            yield values.take(pa.array(numbers % len(videos)))


def _measure_start(path: str, workers: int, cache: str) -> tuple[float, float, float]:
    """Measure seconds to the first batch, and the most private memory of this process and of a worker, MiB."""
    _keep_files_in(cache)
    started = time.perf_counter()
    with _MemoryReader() as memory:
        manifest, model = Manifest.load(path), ModelConfig(size="S", input_size=32)
        plan, rank = BatchPlan(BATCH, BATCH, range(_MORE + 11)), DataRank(torch.device("cpu"))
        with ClipLoader(manifest, DataConfig(workers=workers), model, 0, plan=plan, rank=rank) as loader:
            next(loader)
            seconds = time.perf_counter() - started
            for _ in islice(loader, _MORE):
                pass
            memory.read()
    return seconds, memory.own, memory.child


def _measure_command(name: str, path: str, cache: str) -> tuple[float, float, float, float]:
    """Measure a command: seconds, most private memory of this process, share of the command in it, and of a worker."""
    _keep_files_in(cache)
    before = _private_mib(psutil.Process().memory_full_info)
    started = time.perf_counter()
    with _MemoryReader() as memory, tempfile.TemporaryDirectory(dir=cache) as out:
        COMMANDS[name](Path(path), Path(out))
        memory.read()
    return time.perf_counter() - started, memory.own, memory.own - before, memory.child


@dataclass(frozen=True)
class _KnownVideos(VideoProber):
    """Prober of links to known videos, which opens no file."""

    videos: dict[str, Row] = field(default_factory=dict)
    """Row of each video by the name of its file."""

    def __call__(self, tasks: Sequence[ProbeTask]) -> list[Row]:
        return [replace(self.videos[os.path.basename(task.video.path)], path=task.video.path) for task in tasks]


def _index(path: Path, out: Path) -> None:
    """Index the paths of a manifest, all but the reading of folders and videos."""
    manifest = Manifest.load(path)
    first = (manifest.row(number) for number in range(min(len(manifest), len(_VIDEOS))))
    prober = _KnownVideos(videos={os.path.basename(row.path): row for row in first})
    paths = store_sorted(text.decode() for chunk in manifest.chunks("path") for text in chunk.to_pylist())
    listing = list_paths(paths, str(path.parent))
    index_videos(listing, "", "", workers=1, prober=prober, journal=out / "journal").save(out / "index.parquet")


def _merge(path: Path, out: Path) -> None:
    merge([Manifest.load(_part_of(path))]).save(out / "merged.parquet")


def _part_of(path: Path) -> Path:
    return path.with_name(f"part_{path.name}")


def _stats(path: Path, out: Path) -> None:
    (out / "stats.txt").write_text(Statistics.from_manifest(Manifest.load(path)).to_text())


def _shard_plan(path: Path, out: Path) -> None:
    plan_shards(Manifest.load(path), str(out / "shards"), size=_SHARD)


def _shard(path: Path, out: Path) -> None:
    save_manifest(shard_videos(Manifest.load(path), str(out), size=_SHARD, workers=1), str(out))


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "index": _index, "merge": _merge, "stats": _stats, "shard, its plan": _shard_plan, "shard": _shard
}  # fmt: skip
"""Commands by name: functions of the manifest and of a folder for what they write."""

MOST_ROWS = {"index": 1_000_000, "shard": 100_000}
"""Rows up to which commands are measured that take long, or as much disk as all videos."""


def _keep_files_in(folder: str) -> None:
    os.environ["TMPDIR"] = folder  # of worker processes too
    tempfile.tempdir = None


class _MemoryReader:
    """Largest private memory of this process and of any of its children, MiB, read by a thread in the meantime."""

    def __init__(self) -> None:
        self.own = self.child = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read_often, daemon=True)

    def __enter__(self) -> _MemoryReader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def read(self) -> None:
        """Read the memory now."""
        me = psutil.Process()
        self.own = max(self.own, _private_mib(me.memory_full_info))
        for child in me.children(recursive=True):
            self.child = max(self.child, _private_mib(child.memory_full_info))

    def _read_often(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.read()


def _private_mib(read: Callable[[], Any]) -> float:
    try:
        return float(read().uss) / 2**20
    except psutil.Error:  # the process has ended
        return 0.0
