"""Packing of videos into tar files (shards): network file systems and object stores favour a few large files.

    manifest -> groups of about the given size -> one tar file and its index each, in parallel -> manifest of the shards

Training reads each video as a byte range of its shard. A shard is complete or absent, so that an interrupted job
resumes with the next one. Rows keep their order, names and labels: a run over shards draws the same stream of clips as
a run over the files.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from mvd_scale.data.columns import joined_lines
from mvd_scale.data.host_cache import open_unnamed
from mvd_scale.data.indexing.media_probe import probe_video
from mvd_scale.data.indexing.transcode import TranscodeOptions, transcode
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.storage import DecodeError, absolute, filesystem_of, is_url, read_bytes, run_with_timeout
from mvd_scale.data.worker_pool import run_chunks
from mvd_scale.errors import UserError
from mvd_scale.utils.progress import ProgressReporter

SETTINGS = "shards.json"
"""File in the output folder that records the videos and options from which the shards are made."""

_STILL_SUFFIXES = {"jpeg": ".jpg", "png": ".png", "bmp": ".bmp", "tiff": ".tif", "webp": ".webp"}
_VIDEO_SUFFIXES = {"vp8": ".webm", "vp9": ".webm", "gif": ".gif", "apng": ".png", "webp": ".webp"}

log = logging.getLogger("mvd_scale")


@dataclass(frozen=True)
class Shard:
    """One shard to write, of consecutive usable videos."""

    number: int
    """Number of the shard, from 0."""
    start: int
    """Index, among the usable videos, of its first one."""
    stop: int
    """Index of the one after its last."""


@dataclass(frozen=True)
class _Writer:
    """Function that worker processes apply to shards, with its options. Picklable, by a shared manifest."""

    manifest: Manifest
    folder: str
    encoding: TranscodeOptions | None
    timeout: float

    def __call__(self, tasks: Sequence[Shard]) -> list[int]:
        return [self._write(task) for task in tasks]

    def _write(self, task: Shard) -> int:
        """Write a shard and its index, and return the number of its videos, packed or left out."""
        path = shard_path(self.folder, task.number)
        index = _Index()
        with (
            _atomic_file(path) as target,
            tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for number in range(task.start, task.stop):
                video = self.manifest.row(int(self.manifest.usable[number]))
                try:
                    row, data = self._read(video)
                except DecodeError as error:
                    index.add(replace(video, left_out=error.reason))
                    continue
                # Members are numbered: names from outside are never used as paths.
                member = tarfile.TarInfo(f"{number:09d}{_suffix(row)}")
                member.size = len(data)
                start = target.tell()
                tar.addfile(member, io.BytesIO(data))
                tar.members.clear()  # type: ignore[attr-defined]  # kept for listings, one object for each video
                # In a tar file, the data of a member follows its header of one block.
                index.add(replace(row, path=path, offset=start + tarfile.BLOCKSIZE, size=len(data)))
                self.manifest.release()
        # The index appears last: its presence marks the shard as complete.
        index.write(index_path(path))
        return task.stop - task.start

    def _read(self, video: Row) -> tuple[Row, bytes]:
        read = run_with_timeout(self.timeout, video.path, read_bytes, video.path, video.offset, video.size)
        data = read.tobytes()
        if self.encoding is None or video.still:
            return video, data
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"video{self.encoding.suffix}"
            try:
                transcode(video, data, self.encoding, file)
            except (OSError, ValueError) as error:
                raise DecodeError(video.path, f"cannot be transcoded: {error}") from error
            row = probe_video(
                Row(name=video.name, path=str(file), label=video.label, dataset=video.dataset), timeout=self.timeout
            )
            if row.left_out is not None:
                raise DecodeError(video.path, f"its transcoded file cannot be read: {row.left_out}")
            if row.frames != video.frames:
                raise DecodeError(video.path, f"only {row.frames} of its {video.frames} frames could be transcoded")
            return row, file.read_bytes()


def shard_videos(
    manifest: Manifest,
    out: str,
    *,
    size: int,
    workers: int,
    encoding: TranscodeOptions | None = None,
    timeout: float = 60.0,
) -> Manifest:
    """Pack the usable videos of a manifest into tar files.

    Args:
        manifest: the videos; rows that are left out keep their values and are not packed.
        out: folder or fsspec URL; shards that an earlier call with the same arguments completed are kept.
        size: approximate size of a shard in bytes; a video is never divided.
        workers: number of worker processes.
        encoding: parameters for transcoding every video; None copies the bytes.
        timeout: seconds after which a video counts as unreadable.

    Returns:
        manifest of the same rows in the same order, whose paths and offsets point into the shards.

    Raises:
        UserError: the folder holds other shards or cannot be written, or a video crashes the process that reads it.
    """
    out, manifest = absolute(out), manifest.shared()
    tasks = plan_shards(manifest, out, size=size, encoding=encoding)
    todo = [task for task in tasks if not _exists(index_path(shard_path(out, task.number)))]
    if len(todo) < len(tasks):
        log.info("%d of %d shards are complete already", len(tasks) - len(todo), len(tasks))
    writer = _Writer(manifest, out, encoding, timeout)
    with ProgressReporter("shards written", len(tasks)) as progress:
        progress.add(len(tasks) - len(todo))
        inline_limit = 0 if workers > 1 else len(todo)
        crashed = partial(_raise_crashed, manifest)
        for _ in run_chunks(writer, [[task] for task in todo], workers, crashed, inline_limit=inline_limit):
            progress.add(1)
    packed = Manifest.from_rows(_packed_rows(manifest, out, tasks), source=manifest.source, classes=manifest.classes)
    lost = len(manifest.usable) - len(packed.usable)
    if lost:
        log.warning("%d videos could not be packed and are left out: see `mvd-scale data stats`", lost)
    return packed


def save_manifest(manifest: Manifest, out: str) -> str:
    """Write the manifest into the folder of the shards, and return its path or URL."""
    path = f"{out.rstrip('/')}/manifest.parquet"
    if not is_url(path):
        manifest.save(Path(path))
        return path
    with tempfile.TemporaryDirectory() as scratch:
        manifest.save(Path(scratch) / "manifest.parquet")
        filesystem, inner = filesystem_of(path)
        filesystem.put_file(str(Path(scratch) / "manifest.parquet"), inner)
    return path


def shard_path(folder: str, number: int) -> str:
    """Path or URL of the tar file of a shard."""
    return f"{folder.rstrip('/')}/shard-{number:06d}.tar"


def index_path(shard: str) -> str:
    """Path or URL of the index of a shard, the rows of its videos as JSON."""
    return shard.removesuffix(".tar") + ".json"


def _suffix(video: Row) -> str:
    return (_STILL_SUFFIXES if video.still else _VIDEO_SUFFIXES).get(video.codec, ".mp4")


def plan_shards(manifest: Manifest, out: str, *, size: int, encoding: TranscodeOptions | None = None) -> list[Shard]:
    """Divide the usable videos of a manifest into shards, and record in the folder what they are made from.

    Raises:
        UserError: the folder holds other shards or cannot be written.
    """
    _check_folder(out, manifest, size, encoding)
    tasks: list[Shard] = []
    start, filled = 0, 0
    videos = chain.from_iterable(manifest.size[rows].tolist() for rows in manifest.usable_blocks())
    for number, video in enumerate(videos):
        if number > start and filled + video > size:
            tasks.append(Shard(len(tasks), start, number))
            start, filled = number, 0
        filled += video
    count = len(manifest.usable)
    return [*tasks, Shard(len(tasks), start, count)] if start < count else tasks


def _packed_rows(manifest: Manifest, out: str, tasks: Sequence[Shard]) -> Iterator[Row]:
    """Rows of a manifest in their order, those of packed videos as the indices of their shards have them."""
    place = 0
    for task in tasks:
        packed = _read_index(index_path(shard_path(out, task.number)), task.stop - task.start)
        for row, packed_row in zip(manifest.usable[task.start : task.stop].tolist(), packed, strict=True):
            yield from map(manifest.row, range(place, row))
            yield packed_row
            place = row + 1
        manifest.release()
    yield from map(manifest.row, range(place, len(manifest)))


def _raise_crashed(manifest: Manifest, task: Shard) -> int:
    first, last = (manifest.path[manifest.usable[video]] for video in (task.start, task.stop - 1))
    raise UserError(
        f"shard {task.number} cannot be written: one of its videos, from {first} to {last}, crashes the process that "
        "reads it. Run `mvd-scale data index --verify`, which finds this video and leaves it out"
    )


def _check_folder(out: str, manifest: Manifest, size: int, encoding: TranscodeOptions | None) -> None:
    """Check that the folder has no shards yet, or shards made from the same videos with the same options."""
    digest, before = hashlib.sha256(), b""
    for chunk in manifest.chunks("path"):
        digest.update(before)
        digest.update(joined_lines(chunk).data)
        before = b"\n"
    places = digest.hexdigest()[:16]
    wanted = json.dumps(
        {
            "videos": f"{manifest.digest} {places}",
            "size": size,
            "encoding": None if encoding is None else asdict(encoding),
        }
    )
    settings = f"{out.rstrip('/')}/{SETTINGS}"
    try:
        content = _read_file(settings)
        existing = None if content is None else content.decode()
        if existing is None:
            _write_text(settings, wanted)
    except OSError as error:
        raise UserError(f"the shards cannot be written to {out}: {error.strerror or error}") from error
    if existing is not None and existing != wanted:
        raise UserError(
            f"{out} holds shards of other videos, or made with other options ({existing}), expected {wanted}. Choose "
            "another folder with --out"
        )


def _read_index(path: str, rows: int) -> Iterator[Row]:
    content = _read_file(path)
    if content is None:
        raise UserError(f"{path}, the index of a shard, was removed while its manifest was written: start again")
    if content.count(b"\n") != rows + 2 or not content.endswith(b"\n]\n"):
        raise UserError(
            f"{path}, the index of a shard, is not whole: expected {rows} rows. Remove this file, and start the "
            "command again, which writes the shard anew"
        )
    for line in io.BytesIO(content):
        if line not in (b"[\n", b"]\n"):
            yield Row(**json.loads(line.removesuffix(b"\n").removesuffix(b",").decode()))


class _Index:
    """Index of a shard, a list in JSON with one row in a line; it lies in a file without a name until it is written."""

    def __init__(self) -> None:
        self._file = open_unnamed("the index of a shard")
        self._before = b"[\n"

    def add(self, row: Row) -> None:
        """Append the row of a video."""
        self._file.write(self._before + json.dumps(vars(row)).encode())
        self._before = b",\n"

    def write(self, path: str) -> None:
        """Write the index, of one row or more, to a path or URL."""
        self._file.write(b"\n]\n")
        self._file.seek(0)
        with _atomic_file(path) as target:
            shutil.copyfileobj(self._file, target)


@contextmanager
def _atomic_file(path: str) -> Iterator[BinaryIO]:
    """Open a path or URL for writing: the file appears complete, or not at all."""
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        # To close a file of an object store is to finish it, also after an error: the end of the transaction decides.
        with filesystem.transaction, filesystem.open(inner, "wb") as file:
            yield file
        return
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink()
        raise
    partial.replace(path)


def _write_text(path: str, text: str) -> None:
    with _atomic_file(path) as target:
        target.write(text.encode())


def _read_file(path: str) -> bytes | None:
    try:
        return bytes(read_bytes(path)) if _exists(path) else None
    except DecodeError as error:
        raise UserError(f"{error}. Remove this file, and start the command again") from error


def _exists(path: str) -> bool:
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return bool(filesystem.exists(inner))
    return os.path.exists(path)
