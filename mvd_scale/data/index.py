"""Videos -> manifest: each file is probed once, here, so that training never has to.

A file that cannot be used becomes a row that says why; only a source as a whole can be wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av

from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.errors import UserError

SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"})

log = logging.getLogger("mvd_scale")


@dataclass(frozen=True)
class Probe:
    """What the container says about one video."""

    frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    codec: str = ""
    left_out: str | None = None


def open_source(source: Path, root: Path | None, cache_folder: Path) -> Manifest:
    """The manifest of a recipe's `data.source`.

    A `.parquet` is read. Anything else is indexed into `cache_folder/manifest.parquet`, which serves again as long
    as it describes the same source and nothing in the source is newer.

    Raises:
        UserError: as `build_manifest` and `Manifest.load`.
    """
    if source.suffix == ".parquet":
        manifest = Manifest.load(source)
        _require_usable(manifest, source)
        return manifest
    if not source.exists():
        raise _not_found(source)
    cache = cache_folder / "manifest.parquet"
    if cache.is_file() and cache.stat().st_mtime > _newest(source):
        manifest = Manifest.load(cache)
        if manifest.source == _origin(source, root):
            log.info("%d videos of %s, from %s", len(manifest.usable), source, cache)
            return manifest
    manifest = build_manifest(source, root, workers=len(os.sched_getaffinity(0)))
    manifest.save(cache)
    return manifest


def build_manifest(source: Path, root: Path | None = None, *, workers: int) -> Manifest:
    """Probe every video of a source.

    Args:
        source: a folder, searched recursively for video suffixes (rows sorted by path, no labels), or an annotation
            file of `path label` lines, split at the last space (rows in its order).
        root: folder that relative paths of an annotation file start from; the file's own folder if left out.
        workers: threads; PyAV releases the interpreter while it reads.

    Raises:
        UserError: the source is missing or empty, a line has no label, or no video is usable.
    """
    if source.is_dir():
        paths = sorted(Path(file) for file in _videos(source))
        labels = [-1] * len(paths)
        if not paths:
            raise UserError(
                f"no videos in the folder {source}: expected files with one of the suffixes "
                f"{' '.join(sorted(SUFFIXES))} in it or below. Give the folder that holds the videos"
            )
    elif source.is_file():
        paths, labels = _read_annotations(source, root or source.parent)
    else:
        raise _not_found(source)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        probes = list(pool.map(probe, paths))
    manifest = _assemble(paths, labels, probes, _origin(source, root))
    _tell(manifest, source)
    _require_usable(manifest, source)
    return manifest


def probe(path: Path) -> Probe:
    """Read the container of one video without decoding it; never raises for a bad file.

    Every packet is demuxed: headers lie about truncated files, whether the index stands at their end or front.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        return Probe(left_out=error.strerror or str(error))
    if size == 0:
        return Probe(left_out="empty file")
    try:
        with av.open(str(path)) as container:
            return _probe_stream(container)
    except (av.FFmpegError, UnicodeDecodeError) as error:
        return Probe(left_out=f"cannot be read as a video: {error}")


def _probe_stream(container: av.container.InputContainer) -> Probe:
    if not container.streams.video:
        return Probe(left_out="no video stream" if container.streams.audio else "truncated: its index is missing")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        return Probe(left_out="no decoder for its codec")
    packets = [(packet.is_corrupt, packet.is_discard) for packet in container.demux(stream) if packet.size]
    frames = sum(not discard for _, discard in packets)
    if any(corrupt for corrupt, _ in packets) or len(packets) < stream.frames:
        return Probe(left_out=f"truncated: {len(packets)} frames readable of {stream.frames}")
    if not frames:
        return Probe(left_out="no frames")
    if not context.width or not context.height:
        return Probe(left_out="no picture size")
    rate = stream.average_rate
    return Probe(
        frames=frames,
        fps=float(rate) if rate else 0.0,
        height=context.height,
        width=context.width,
        codec=context.codec.canonical_name,
    )


def _videos(folder: Path) -> list[str]:
    return [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES
    ]


def _read_annotations(file: Path, root: Path) -> tuple[list[Path], list[int]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file: expected `path label` lines, a folder or a .parquet") from error
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.removeprefix("-").isdecimal():
            raise UserError(
                f"{file}:{number}: no label in {line.strip()!r}: expected `path label`, the label a whole number "
                "after the last space. Write -1 for a video without a class"
            )
        paths.append(root / path)
        labels.append(int(label))
    if not paths:
        raise UserError(f"the annotation file {file} is empty: expected one `path label` per line")
    return paths, labels


def _assemble(paths: Sequence[Path], labels: Sequence[int], probes: Sequence[Probe], origin: str) -> Manifest:
    return Manifest.of(
        [
            Row(name=path.name, path=os.path.abspath(path), label=label, **vars(probe))
            for path, label, probe in zip(paths, labels, probes, strict=True)
        ],
        source=origin,
    )


def _tell(manifest: Manifest, source: Path) -> None:
    log.info("%d usable videos of %d in %s", len(manifest.usable), len(manifest), source)
    bad = [(path, why) for path, why in zip(manifest.path, manifest.left_out, strict=True) if why is not None]
    if bad:
        shown = "; ".join(f"{Path(path).name} ({why})" for path, why in bad[:5])
        rest = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        log.warning("%d videos of %s are left out: %s%s", len(bad), source, shown, rest)


def _require_usable(manifest: Manifest, source: Path) -> None:
    if not len(manifest.usable):
        why = next((f": {reason}" for reason in manifest.left_out if reason is not None), "")
        raise UserError(
            f"none of the {len(manifest)} videos of {source} can be used, the first one because{why or ' it is none'}. "
            "Check the paths (data.source, data.root) and that the files play"
        )


def _not_found(source: Path) -> UserError:
    return UserError(
        f"data.source {source} does not exist: expected a manifest (.parquet), a folder of videos or an annotation "
        "file of `path label` lines"
    )


def _origin(source: Path, root: Path | None) -> str:
    return os.path.abspath(source) + (f" root {os.path.abspath(root)}" if root is not None else "")


def _newest(source: Path) -> float:
    """Time of the last change in a source: seconds since 1970."""
    if source.is_file():
        return source.stat().st_mtime
    folders = [parent for parent, _, _ in os.walk(source, followlinks=True)]
    return max(os.lstat(path).st_mtime for path in [*folders, *_videos(source)])
