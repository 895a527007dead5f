"""Build of a manifest from videos: each file is probed once, here, so that training never probes files.

    list the sources -> take this machine's part -> probe in parallel, with a journal -> manifest

A file that cannot be used becomes a row with the reason in `left_out`; only faults of a source as a whole are raised.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mvd_scale.config.data import DataConfig
from mvd_scale.data.filesystem import find_files
from mvd_scale.data.indexing.journal import Journal, Places
from mvd_scale.data.indexing.listing import Listing, ListOptions
from mvd_scale.data.indexing.media_probe import probe_video
from mvd_scale.data.indexing.sources import list_videos
from mvd_scale.data.manifest import WHOLE_FILE, Manifest, Row
from mvd_scale.data.spool import Part, Stored
from mvd_scale.data.storage import absolute, is_url
from mvd_scale.data.worker_pool import run_chunks
from mvd_scale.errors import UserError
from mvd_scale.utils.progress import ProgressReporter

CHUNK = 32
"""Videos that a worker process takes from the queue at a time."""

_LOOKED_UP = 1024
"""Videos that are looked up in the journal at a time."""

log = logging.getLogger("mvd_scale")


class ProbeTask(NamedTuple):
    """A video to probe."""

    number: int
    """Its number in the listing, from 0."""
    key: str
    """Its identity in the journal, see `_key`."""
    video: Row


@dataclass(frozen=True)
class VideoProber:
    """Function that worker processes apply to chunks of videos, with its options. Picklable."""

    timeout: float = 60.0
    """Seconds after which a video counts as unreadable."""

    verify: bool = False
    """Also decode the first, the middle and the last frame of each video."""

    def __call__(self, tasks: Sequence[ProbeTask]) -> list[Row]:
        return [probe_video(task.video, timeout=self.timeout, verify=self.verify) for task in tasks]


def load_source(data: DataConfig, cache_folder: Path) -> Manifest:
    """Read or build the manifest of a recipe's `data.source` or `data.mixture`.

    A `.parquet` file is read. Any other source is indexed, and the manifest is cached in `cache_folder`. A cached
    manifest is used again if it describes the same source and no file of the source is newer. The rows of a mixture
    follow one data set after the other, numbered in the column `dataset`; classes of the same name become one class.
    With `data.upright_stills`, still images are displayed as their orientation tags say.

    Raises:
        UserError: there is no source; also as `build_manifest` and `Manifest.load`.
    """
    if data.mixture is None:
        if data.source is None:
            raise UserError(
                "data.source is missing: give a folder of videos, an annotation file or a manifest "
                "with `--data.source PATH`"
            )
        manifest = _open_one(data.source, data.root, cache_folder / "manifest.parquet")
    else:
        parts = data.mixture.items()
        manifest = concat_manifests(
            [_open_one(part.source, part.root, cache_folder / f"manifest_{name}.parquet") for name, part in parts]
        )
    return manifest.with_upright_stills() if data.upright_stills else manifest


def concat_manifests(manifests: Sequence[Manifest]) -> Manifest:
    """Concatenate manifests into one, in which the column `dataset` is the index of the manifest a row comes from.

    If one manifest has labels but no class names, its labels cannot be matched with those of the others: then all
    labels become -1.
    """
    nameless = any(not manifest.classes and _has_labels(manifest) for manifest in manifests)
    if nameless:
        log.info("all labels of the mixture are dropped: one of its data sets has labels but no class names")
    names = () if nameless else tuple(dict.fromkeys(name for manifest in manifests for name in manifest.classes))
    number = {name: label for label, name in enumerate(names)}

    def chunks(name: str) -> Iterator[pa.Array]:
        for place, manifest in enumerate(manifests):
            # The last entry is that of videos without a class, whose label is -1.
            labels = np.array([*(number[known] for known in manifest.classes if not nameless), -1], np.int64)
            for chunk in manifest.chunks(name):
                if name == "dataset":
                    chunk = pa.array(np.full(len(chunk), place, np.int64))
                elif name == "label":
                    chunk = pa.array(labels[np.minimum(chunk.to_numpy(), len(labels) - 1)])
                yield chunk

    source = "; ".join(manifest.source for manifest in manifests)
    return Manifest.from_chunks(chunks, sum(map(len, manifests)), source=source, classes=names)


def _has_labels(manifest: Manifest) -> bool:
    return any((chunk.to_numpy() >= 0).any() for chunk in manifest.chunks("label"))


def build_manifest(
    source: str | Path | Sequence[str],
    root: str | Path | None = None,
    *,
    workers: int,
    options: ListOptions | None = None,
    prober: VideoProber | None = None,
    part: tuple[int, int] | None = None,
    journal: Path | None = None,
) -> Manifest:
    """Probe every video of some sources.

    Args:
        source: one or several sources, each of a form that `listing.SOURCE_FORMS` names.
        root: as `ListOptions.root`.
        workers: number of worker processes; a small number of videos is probed in this process.
        options: properties that lists do not state themselves.
        prober: time limit in seconds, and whether to verify.
        part: (3, 64) for the third of 64 equal parts of the listing; `merge` combines the parts.
        journal: file that records every probed video, so that an interrupted index resumes.

    Raises:
        UserError: a source is missing or empty, a list is malformed, or no video is usable.
    """
    sources = [str(source)] if isinstance(source, (str, Path)) else list(source)
    options = options or ListOptions()
    if root is not None:
        options = replace(options, root=str(root))
    return index_videos(
        list_videos(sources, options),
        _origin(sources, options),
        ", ".join(sources),
        workers=workers,
        prober=prober or VideoProber(),
        part=part,
        journal=journal,
    )


def index_videos(
    listing: Listing,
    origin: str,
    source: str,
    *,
    workers: int,
    prober: VideoProber,
    part: tuple[int, int] | None = None,
    journal: Path | None = None,
) -> Manifest:
    """Probe every video of a listing. Beyond the listing, only files that lie on disk grow with their number.

    Args:
        listing: the videos.
        origin: sources and options of the listing, `Manifest.source`.
        source: the sources, for messages.
        workers: as `build_manifest`, like those that follow.

    Raises:
        UserError: no video is usable.
    """
    number, parts = part or (1, 1)
    place = range(len(listing.rows) * (number - 1) // parts, len(listing.rows) * number // parts)
    rows = _probe_all(Part(listing.rows, place), workers, prober, journal)
    manifest = Manifest.from_rows(rows, source=origin, classes=listing.classes, part=part)
    _log_summary(manifest, source)
    if len(manifest) or part is None:
        _require_usable(manifest, source)
    return manifest


def merge(manifests: Sequence[Manifest]) -> Manifest:
    """Combine the manifests of all parts of one source, given in any order, into one manifest.

    Raises:
        UserError: a manifest is not a part, the parts are of different sources, or a part is missing or repeated.
    """
    whole = [number for number, manifest in enumerate(manifests, start=1) if manifest.part is None]
    if whole:
        raise UserError(
            f"manifest {whole[0]} of those given is not a part: expected manifests made with `data index --part K/N`. "
            "To train on several whole manifests, name them in `data.mixture`"
        )
    parts = sorted(manifests, key=lambda manifest: manifest.part or (0, 0))
    if len({(manifest.source, manifest.classes) for manifest in parts}) > 1:
        sources = sorted({manifest.source for manifest in parts})
        raise UserError(
            f"the manifests are parts of different sources ({'; '.join(sources)}): expected the parts of one source"
        )
    numbers = [manifest.part for manifest in parts]
    counts = {part[1] for part in numbers if part is not None}
    count = max(counts)
    expected = [(number, count) for number in range(1, count + 1)]
    if numbers != expected:
        have = ", ".join(f"{part[0]}/{part[1]}" for part in numbers if part is not None)
        missing = [f"{number}/{count}" for number, _ in expected if (number, count) not in numbers]
        lack = f", missing are {', '.join(missing)}" if missing else ""
        raise UserError(f"expected each of {count} parts once: given are {have}{lack}")

    def chunks(name: str) -> Iterator[pa.Array]:
        return chain.from_iterable(manifest.chunks(name) for manifest in parts)

    return Manifest.from_chunks(chunks, sum(map(len, parts)), source=parts[0].source, classes=parts[0].classes)


def _open_one(source: str, root: str | None, cache: Path) -> Manifest:
    if source.endswith(".parquet"):
        manifest = Manifest.load(source)
        if manifest.part is not None:
            raise UserError(
                f"{source} holds only part {manifest.part[0]}/{manifest.part[1]} of the videos of its source: combine "
                "all parts with `mvd-scale data merge`"
            )
        _require_usable(manifest, source)
        return manifest
    # A cached manifest is used if nothing in the source is newer; for URLs, which have no reliable times, it always is.
    origin = _origin([source], ListOptions(root=root))
    if cache.is_file() and (is_url(source) or (os.path.exists(source) and cache.stat().st_mtime > _newest(source))):
        manifest = Manifest.load(cache)
        if manifest.source == origin:
            log.info("%d videos of %s, from %s", len(manifest.usable), source, cache)
            return manifest
    manifest = build_manifest(source, root, workers=len(os.sched_getaffinity(0)))
    manifest.save(cache)
    cache.touch()  # `save` leaves the time of an equal file as it was
    # Of a large manifest, the columns of the file are those of its copies and of later starts too.
    return Manifest.load(cache)


def _probe_all(videos: Stored[Row], workers: int, prober: VideoProber, journal: Path | None) -> Iterator[Row]:
    """Probe the videos that the journal does not know, and yield the rows of all videos in their order.

    No more rows are held than are worked on: all others lie in the journal.
    """
    with Journal(journal, {"verify": prober.verify, "version": 2}) as book, Places() as places:
        with ProgressReporter("videos probed", len(videos)) as progress:
            for tasks, rows in run_chunks(prober, _unknown(videos, book, places, progress), workers, _crashed):
                places.note([task.number for task in tasks], book.add([task.key for task in tasks], rows))
                progress.add(len(rows))
        for video, place in zip(videos, places, strict=True):
            # The journal may come from another listing of the same files: names, labels and paths are of this one.
            yield book.row(place, name=video.name, label=video.label, path=video.path)


def _unknown(
    videos: Iterable[Row], book: Journal, places: Places, progress: ProgressReporter
) -> Iterator[list[ProbeTask]]:
    """Yield the videos that the journal does not know, in chunks; the places of the others are noted on the way."""
    numbered = enumerate(videos)
    chunk: list[ProbeTask] = []
    while block := [ProbeTask(number, _key(video), video) for number, video in islice(numbered, _LOOKED_UP)]:
        known: dict[int, int] = {}
        for task, place in zip(block, book.find([task.key for task in block]), strict=True):
            if place is not None:
                known[task.number] = place
                continue
            chunk.append(task)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        places.note(known, known.values())
        progress.add(len(known))
    if chunk:
        yield chunk


def _crashed(task: ProbeTask) -> Row:
    return replace(task.video, left_out="crashes the process that reads it")


def _key(video: Row) -> str:
    """Identity of a video in the journal: path, place in a shard, modification time and size of the file."""
    changed = 0
    if not is_url(video.path):
        try:
            stat = os.stat(video.path)
        except OSError:
            return f"{video.path} is missing"
        changed = stat.st_mtime_ns + stat.st_size
    place = "" if video.offset == WHOLE_FILE else f"{video.offset}+{video.size}"
    return f"{video.path} {place} {changed}"


def _log_summary(manifest: Manifest, source: str) -> None:
    log.info("%d usable videos of %d in %s", len(manifest.usable), len(manifest), source)
    bad = manifest.unusable
    if len(bad):
        shown = "; ".join(f"{Path(manifest.name[row]).name} ({manifest.left_out[row]})" for row in bad[:5].tolist())
        rest = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        log.warning("%d videos of %s cannot be used and are left out: %s%s", len(bad), source, shown, rest)


def _require_usable(manifest: Manifest, source: str) -> None:
    if not len(manifest.usable):
        why = f" (first reason: {manifest.left_out[0]})" if len(manifest) else ""
        raise UserError(
            f"none of the {len(manifest)} videos of {source} can be used{why}. Check the paths (data.source, "
            "data.root), and that a player shows the files"
        )


def _origin(sources: Sequence[str], options: ListOptions) -> str:
    words = [absolute(source) for source in sources]
    for name, value in vars(options).items():
        if value is not None and value != getattr(ListOptions(), name):
            words.append(f"{name} {absolute(value) if name == 'root' else value}")
    return " ".join(words)


def _newest(source: str) -> float:
    """Time of the last change in a source, in seconds since 1970."""
    if os.path.isfile(source):
        return os.stat(source).st_mtime
    files = find_files(source, lambda _: True)
    # Folders count too: deleting or renaming a file changes the time of its folder only.
    folders = {source, *(os.path.dirname(path) for path in files)}
    return max(os.lstat(path).st_mtime for path in chain(folders, files))
