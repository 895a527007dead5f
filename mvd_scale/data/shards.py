"""Many videos -> few tar files, each read by ranges: kinder to network file systems and object stores.

    manifest -> groups of about the asked size -> one tar file and its index each, in parallel -> manifest of the shards

A shard is complete or absent, so that a killed job goes on with the next one. Rows keep their order, names and labels:
a run over shards sees the same stream as one over the files.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mvd_scale.data.manifest import IMAGE_CODECS, Manifest, Row
from mvd_scale.data.probe import probe
from mvd_scale.data.processes import run_chunks
from mvd_scale.data.reencode import Encoding, reencode
from mvd_scale.data.storage import DecodeError, absolute, filesystem_of, is_url, read_bytes, within
from mvd_scale.errors import UserError
from mvd_scale.progress import Advance

SETTINGS = "shards.json"
"""File in the folder that says what the shards are made of."""

_SUFFIXES = {
    "jpeg": ".jpg",
    "png": ".png",
    "bmp": ".bmp",
    "tiff": ".tif",
    "webp": ".webp",
    "vp8": ".webm",
    "vp9": ".webm",
}

log = logging.getLogger("mvd_scale")


@dataclass(frozen=True)
class _Task:
    """One shard to be written."""

    number: int
    first_row: int
    videos: list[Row]


@dataclass(frozen=True)
class _Writer:
    """What a worker process does."""

    folder: str
    encoding: Encoding | None
    timeout: float

    def __call__(self, tasks: Sequence[_Task]) -> list[list[Row]]:
        return [self._write(task) for task in tasks]

    def _write(self, task: _Task) -> list[Row]:
        rows = []
        path = shard_path(self.folder, task.number)
        with _Target(path) as target, tarfile.open(fileobj=target.file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, video in enumerate(task.videos, start=task.first_row):
                try:
                    row, data = self._read(video)
                except DecodeError as error:
                    rows.append(replace(video, left_out=error.reason))
                    continue
                # A name of our own: what a video is called elsewhere is never a path here.
                member = tarfile.TarInfo(f"{number:09d}{_SUFFIXES.get(row.codec, '.mp4')}")
                member.size = len(data)
                start = target.file.tell()
                tar.addfile(member, io.BytesIO(data))
                rows.append(replace(row, path=path, offset=start + tarfile.BLOCKSIZE, size=len(data)))
        # Last, for it says that the shard is whole.
        _write_text(index_path(path), json.dumps([asdict(row) for row in rows]))
        return rows

    def _read(self, video: Row) -> tuple[Row, bytes]:
        read = within(self.timeout, video.path, read_bytes, video.path, video.offset, video.size)
        data = read.tobytes()
        if self.encoding is None or video.codec in IMAGE_CODECS:
            return video, data
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"video{self.encoding.suffix}"
            try:
                reencode(video, data, self.encoding, file)
            except (OSError, ValueError) as error:
                raise DecodeError(video.path, f"cannot be encoded anew: {error}") from error
            row = probe(
                Row(name=video.name, path=str(file), label=video.label, dataset=video.dataset), timeout=self.timeout
            )
            if row.left_out is not None:
                raise DecodeError(video.path, f"its new encoding cannot be read: {row.left_out}")
            if row.frames != video.frames:
                raise DecodeError(video.path, f"only {row.frames} of its {video.frames} frames could be encoded anew")
            return row, file.read_bytes()


def shard_videos(
    manifest: Manifest,
    out: str,
    *,
    size: int,
    workers: int,
    encoding: Encoding | None = None,
    timeout: float = 60.0,
) -> Manifest:
    """Pack the usable videos of a manifest into tar files.

    Args:
        manifest: the videos; left out ones stay as they are, without a place in a shard.
        out: folder or fsspec URL; shards that stand there from the same call are kept.
        size: bytes of a shard, about; a video is never divided.
        workers: processes.
        encoding: how to encode every video anew; its bytes are copied if None.
        timeout: seconds after which a video counts as unreadable.

    Returns:
        the manifest whose rows point into the shards, in the same order.

    Raises:
        UserError: the folder holds other shards, or cannot be written.
    """
    out = absolute(out)
    tasks = _divide(manifest, size)
    _claim(out, manifest, size, encoding)
    stand = {task.number: _finished(out, task) for task in tasks}
    done = {number: rows for number, rows in stand.items() if rows is not None}
    if done:
        log.info("%d of %d shards stand already", len(done), len(tasks))
    todo = [task for task in tasks if task.number not in done]
    writer = _Writer(out, encoding, timeout)
    with Advance("shards written", len(tasks)) as progress:
        progress.add(len(done))
        few = 0 if workers > 1 else len(todo)
        for number, (rows,) in run_chunks(writer, [[task] for task in todo], workers, _crashed, few=few):
            done[todo[number].number] = rows
            progress.add(1)
    everything = manifest.rows
    packed_rows = [row for task in tasks for row in done[task.number]]
    for place, row in zip(manifest.usable.tolist(), packed_rows, strict=True):
        everything[place] = row
    packed = Manifest.of(everything, source=manifest.source, classes=manifest.classes)
    lost = len(manifest.usable) - len(packed.usable)
    if lost:
        log.warning("%d videos could not be packed and are left out: see `mvd-scale data stats`", lost)
    return packed


def save_manifest(manifest: Manifest, out: str) -> str:
    """Write the manifest beside the shards; returns where."""
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
    """Where a shard lies."""
    return f"{folder.rstrip('/')}/shard-{number:06d}.tar"


def index_path(shard: str) -> str:
    """Where the rows of a shard lie."""
    return shard.removesuffix(".tar") + ".json"


def _divide(manifest: Manifest, size: int) -> list[_Task]:
    tasks: list[_Task] = []
    group: list[Row] = []
    first, filled = 0, 0
    for number, row in enumerate(manifest.usable.tolist()):
        video = manifest.row(row)
        if group and filled + video.size > size:
            tasks.append(_Task(len(tasks), first, group))
            group, first, filled = [], number, 0
        group.append(video)
        filled += video.size
    return [*tasks, _Task(len(tasks), first, group)] if group else tasks


def _crashed(task: _Task) -> list[Row]:
    raise UserError(
        f"shard {task.number} cannot be written: one of its videos, from {task.videos[0].path} to "
        f"{task.videos[-1].path}, kills the program that reads it. Index with --verify to find and leave it out"
    )


def _claim(out: str, manifest: Manifest, size: int, encoding: Encoding | None) -> None:
    """See that the folder is free, or holds shards of the same videos made in the same way."""
    places = hashlib.sha256("\n".join(manifest.path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    wanted = json.dumps(
        {
            "videos": f"{manifest.digest} {places}",
            "size": size,
            "encoding": None if encoding is None else asdict(encoding),
        }
    )
    settings = f"{out.rstrip('/')}/{SETTINGS}"
    try:
        stands = _read_text(settings)
        if stands is None:
            _write_text(settings, wanted)
    except OSError as error:
        raise UserError(f"the shards cannot be written to {out}: {error.strerror or error}") from error
    if stands is not None and stands != wanted:
        raise UserError(
            f"{out} holds shards of other videos, or made in another way ({stands}); this call asks for {wanted}. "
            "Choose another folder with --out"
        )


def _finished(out: str, task: _Task) -> list[Row] | None:
    text = _read_text(index_path(shard_path(out, task.number)))
    return None if text is None else [Row(**row) for row in json.loads(text)]


class _Target:
    """A file that appears whole or not at all."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> _Target:
        if is_url(self.path):
            filesystem, inner = filesystem_of(self.path)
            # Object stores show a file when it is closed.
            self.file = filesystem.open(inner, "wb")
        else:
            self.partial = Path(f"{self.path}.partial")
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.partial.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not is_url(self.path) and kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if not is_url(self.path):
            if kind is None:
                self.partial.replace(self.path)
            else:
                self.partial.unlink()


def _write_text(path: str, text: str) -> None:
    with _Target(path) as target:
        target.file.write(text.encode())


def _read_text(path: str) -> str | None:
    try:
        return bytes(read_bytes(path)).decode() if _there(path) else None
    except DecodeError as error:
        raise UserError(f"{error}. Remove it, and start again") from error


def _there(path: str) -> bool:
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return bool(filesystem.exists(inner))
    return os.path.exists(path)
