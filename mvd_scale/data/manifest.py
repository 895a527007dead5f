"""Manifest: a table of videos, one row per video, stored as Parquet.

A large manifest is not read into memory: its columns lie in a file that all processes of a host map (`columns`,
`host_cache`), and are read, written and derived in blocks.

Workers import this module: it must not import torch.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.fs import LocalFileSystem

from mvd_scale.data.columns import (
    BLOCK,
    Categories,
    ColumnFile,
    ColumnWriter,
    Texts,
    encode_texts,
    in_memory,
    joined_lines,
)
from mvd_scale.data.host_cache import make_unnamed, open_or_make, open_unnamed
from mvd_scale.data.orientation import orientation_of_exif
from mvd_scale.data.parquet import ParquetSource

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("frames", pa.int64()),
        ("fps", pa.float64()),
        ("variable_rate", pa.bool_()),
        ("duration", pa.float64()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("rotation", pa.int64()),
        ("mirrored", pa.bool_()),
        ("exif_orientation", pa.int64()),
        ("still", pa.bool_()),
        ("stream", pa.int64()),
        ("codec", pa.string()),
        ("pixel_format", pa.string()),
        ("colour", pa.string()),
        ("access", pa.string()),
        ("plain", pa.bool_()),
        ("keyframe_interval", pa.int64()),
        ("first_pts", pa.int64()),
        ("pts_step", pa.int64()),
        ("label", pa.int64()),
        ("dataset", pa.int64()),
        ("left_out", pa.string()),
    ]
)
_ORIGIN = b"mvd_scale"
_CATEGORIES = ("codec", "pixel_format", "colour", "access")
"""Columns of texts of which only few differ."""

MAPPED_FROM = 50_000
"""Rows from which on columns lie in a file that processes map; fewer take at most about 10 MB in each process."""

_SPOOLED = 1 << 13
"""Rows that are held as objects while a manifest is built of many of them."""

Chunks = Callable[[str], Iterator[pa.Array]]
"""Function from the name of a column of `SCHEMA` to its values, in order, in pieces: texts as strings or binaries."""

WHOLE_FILE = -1
"""`offset` of a video that is a file of its own, not a range of a shard."""

Access = Literal["packets", "times", "count"]
"""Proof of the frames of a video, and the way to find one of them, see `Row.access`."""


@dataclass(frozen=True)
class Row:
    """One video, as one row of a manifest."""

    name: str
    """Name of the video: its path relative to the source. It is the same for files and for shards made from them."""

    path: str
    """Absolute path or URL of the file, or of the shard that holds it."""

    label: int = -1
    """Class, from 0; -1 if there is none."""

    offset: int = WHOLE_FILE
    """First byte of the video within its shard; -1 if the video is a file of its own."""

    size: int = 0
    """Size of the encoded video in bytes."""

    frames: int = 0
    """Number of frames that the decoder puts out; 0 in a row that is left out."""

    fps: float = 0.0
    """Average frames per second; 0 if the container does not state it."""

    variable_rate: bool = False
    """Whether the durations of the frames differ (variable frame rate)."""

    duration: float = 0.0
    """Duration in seconds."""

    height: int = 0
    """Height in pixels as displayed, after `mirrored` and `rotation`."""

    width: int = 0
    """Width in pixels as displayed, after `mirrored` and `rotation`."""

    rotation: int = 0
    """Counterclockwise rotation, in degrees, from the coded frame to the displayed one: 0, 90, 180 or 270."""

    mirrored: bool = False
    """Whether the coded frame is mirrored left-right before it is rotated."""

    exif_orientation: int = 1
    """Orientation tag (EXIF, 1 to 8) of a still image, which height, width and rotation ignore until
    `with_upright_stills`."""

    still: bool = False
    """Whether the file is a single still image, which counts as a video of one frame."""

    stream: int = 0
    """Index, among all streams of the container, of the video stream that is decoded."""

    codec: str = ""
    """FFmpeg's name of the codec: h264, hevc, vp9 ...; for a still image jpeg, png, bmp, tiff or webp."""

    pixel_format: str = ""
    """FFmpeg's name of the pixel format: yuv420p, yuv420p10le ..."""

    colour: str = "bt601"
    """Matrix by which the stream's tags convert YUV to RGB: bt601 (also where they are silent, as FFmpeg does), bt709,
    bt2020 ..., followed by ` full` for samples of the full range of 0 to 255."""

    access: Access = "packets"
    """Proof of the frames, and the way to find one. `packets`: reading the packets proves that each is one frame, in
    order and evenly spaced. `times`: the whole file was decoded; the times of the decoder's output rise strictly and
    can be relied on. `count`: it was decoded, but its times cannot be relied on: frames are counted from the start."""

    plain: bool = True
    """Whether every packet is one displayed frame, every group of pictures is closed, and the file has one video
    stream, which states its range itself if it is full: then DALI, which builds its own index of the packets and does
    not read the container's tags, finds the same frames."""

    keyframe_interval: int = 0
    """Largest number of frames from one keyframe to the next, or to the end."""

    first_pts: int = 0
    """Presentation time of the first frame, in ticks of the stream."""

    pts_step: int = 0
    """Ticks from each frame to the next, where a seek by them is safe; 0 if they differ, or cannot be relied on."""

    dataset: int = 0
    """Index of the data set of a mixture to which the video belongs; 0 without a mixture."""

    left_out: str | None = None
    """Reason why the video is not used; None for a usable video."""

    @property
    def coded_size(self) -> tuple[int, int]:
        """Height and width in pixels of a decoded frame, before `mirrored` and `rotation`."""
        return (self.width, self.height) if self.rotation % 180 else (self.height, self.width)


class Kind(NamedTuple):
    """Properties of a video by which its decoder is chosen."""

    still: bool
    plain: bool
    codec: str
    pixel_format: str
    colour: str
    height: int
    """Height in pixels of a decoded frame, see `Row.coded_size`."""
    width: int
    """Width in pixels of a decoded frame."""


@dataclass(frozen=True)
class Manifest:
    """All videos of a source in the order of the source, including those that cannot be used.

    Training never probes files: it takes all properties of a video from here. A video is identified by its row number
    everywhere (`ClipBatch.video_ids`, `quarantine.jsonl`). The columns are the fields of `Row`, one entry per video.
    """

    name: Sequence[str]
    path: Sequence[str]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    frames: NDArray[np.int64]
    fps: NDArray[np.float64]
    variable_rate: NDArray[np.bool_]
    duration: NDArray[np.float64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    rotation: NDArray[np.int64]
    mirrored: NDArray[np.bool_]
    exif_orientation: NDArray[np.int64]
    still: NDArray[np.bool_]
    stream: NDArray[np.int64]
    codec: Sequence[str]
    pixel_format: Sequence[str]
    colour: Sequence[str]
    access: Sequence[str]
    plain: NDArray[np.bool_]
    keyframe_interval: NDArray[np.int64]
    first_pts: NDArray[np.int64]
    pts_step: NDArray[np.int64]
    label: NDArray[np.int64]
    dataset: NDArray[np.int64]
    left_out: Sequence[str | None]

    source: str = ""
    """Sources and options of the index, by which a cached manifest is recognised."""

    classes: tuple[str, ...] = ()
    """Names of the classes in the order of the labels; empty if the classes have no names."""

    part: tuple[int, int] | None = None
    """(3, 64) if the manifest holds the third of 64 equal parts of the source; None if it holds the whole source."""

    _file: ColumnFile | None = field(default=None, init=False, repr=False, compare=False)
    """File that the columns are views of; None if they lie in memory of this process."""

    _parquet: ParquetSource | None = field(default=None, init=False, repr=False, compare=False)
    """Parquet file that has the same rows and description."""

    @classmethod
    def from_rows(cls, rows: Iterable[Row], **about: Any) -> Self:
        """Build a manifest from rows; `about` gives the fields `source`, `classes` and `part`.

        Of many rows, a block is held at a time; the others lie in a Parquet file without a name, of 20 bytes a row.
        """
        coming = iter(rows)
        block = list(islice(coming, MAPPED_FROM))
        if len(block) < MAPPED_FROM:
            return cls._in_memory(block, **about)
        with open_unnamed("the rows of a manifest") as spool:
            path = f"/proc/self/fd/{spool.fileno()}"
            with _parquet_writer(path, about) as writer:
                while block:
                    cls._in_memory(block)._write_to(writer)
                    block.clear()  # before the next rows are made
                    block += islice(coming, _SPOOLED)
            source = ParquetSource.open(path, SCHEMA.names, _ORIGIN)
            return cls.from_chunks(source.chunks, source.rows, **about)

    @classmethod
    def _in_memory(cls, rows: Sequence[Row], **about: Any) -> Self:
        columns: dict[str, Any] = {}
        for column in SCHEMA:
            values = [getattr(row, column.name) for row in rows]
            text = column.type == pa.string()
            columns[column.name] = values if text else np.array(values, _dtype(column.name))
        return cls(**columns, **about)

    @classmethod
    def from_chunks(cls, chunks: Chunks, rows: int, **about: Any) -> Self:
        """Build a manifest from its columns in pieces, of which it holds one at a time if the manifest is large.

        Args:
            chunks: the columns; each may be asked for more than once.
            rows: number of rows.
            about: the fields `source`, `classes` and `part`.
        """
        if rows >= MAPPED_FROM:
            what = f"a manifest of {rows} rows"
            return cls._of_file(make_unnamed(what, lambda file: _write_columns(file, chunks, about)))
        columns: dict[str, Any] = {}
        for column in SCHEMA:
            if column.type == pa.string():
                columns[column.name] = [
                    text for chunk in chunks(column.name) for text in _as_strings(chunk).to_pylist()
                ]
            else:
                empty = np.zeros(0, _dtype(column.name))
                columns[column.name] = np.concatenate([empty, *map(_as_numbers, chunks(column.name))])
        return cls(**columns, **about)

    @classmethod
    def _of_file(cls, file: ColumnFile) -> Self:
        """Manifest whose columns are views of a file that `_write_columns` wrote."""
        columns: dict[str, Any] = {}
        for column in SCHEMA:
            name = column.name
            if name in _CATEGORIES:
                columns[name] = Categories(file[name], json.loads(file[f"{name}.values"].tobytes()))
            elif column.type == pa.string():
                present = file.get(f"{name}.present")
                columns[name] = Texts(file[f"{name}.ends"], file[f"{name}.bytes"], present)
            else:
                columns[name] = file[name]
        manifest = cls(**columns, **_described(file.about))
        object.__setattr__(manifest, "_file", file)
        return manifest

    def shared(self) -> Self:
        """Return this manifest with columns in memory or a file that worker processes map; its pickle is small.

        The pickle is valid in processes of this host, as long as the manifest lives in this process.
        """
        if self._file is not None:
            return self
        about = {"source": self.source, "classes": self.classes, "part": self.part}
        return type(self)._of_file(in_memory(lambda file: _write_columns(file, self.chunks, about)))

    def __reduce__(self) -> Any:
        if self._file is not None:
            return type(self)._of_file, (self._file,)
        return partial(type(self), **{part.name: getattr(self, part.name) for part in fields(self) if part.init}), ()

    def release(self) -> None:
        """Give mapped pages back to the system, which counts them as memory of this process; see `ColumnFile`."""
        if self._file is not None:
            self._file.release()

    def __len__(self) -> int:
        return len(self.path)

    def row(self, number: int) -> Row:
        """Row of one video, by its row number."""
        return self.row_with(number, [field.name for field in fields(Row)])

    def row_with(self, number: int, columns: Sequence[str], **others: Any) -> Row:
        """Row of one video with the values of some columns; `others` and defaults give the rest."""
        values = {name: getattr(self, name)[number] for name in columns}
        values = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
        return Row(**values, **others)

    @property
    def rows(self) -> list[Row]:
        """Rows of all videos, in order."""
        return [self.row(number) for number in range(len(self))]

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Select rows by number, int64 (rows,), in any order, repetitions allowed."""
        columns: dict[str, Any] = {}
        for name in SCHEMA.names:
            column = getattr(self, name)
            columns[name] = column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows.tolist()]
        return replace(self, **columns)

    def chunks(self, name: str) -> Iterator[pa.Array]:
        """Values of a column in blocks of `BLOCK` rows: texts as binaries, so that any file name is one.

        Mapped pages are given back between two blocks.
        """
        column = getattr(self, name)
        for start in range(0, len(self), BLOCK):
            if isinstance(column, Texts):
                yield column.block(start, start + BLOCK)
            elif isinstance(column, np.ndarray):
                yield pa.array(column[start : start + BLOCK])
            else:
                yield encode_texts(column[start : start + BLOCK])
            self.release()

    def codes(self, name: str, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], list[str]]:
        """Texts of some rows of a column of which only few differ.

        Returns:
            a number for each row, int32 (rows,), and the texts that they are the indices of.
        """
        column = getattr(self, name)
        if isinstance(column, Categories):
            return column.codes[rows], column.values
        values: dict[str, int] = {}
        codes = [values.setdefault(column[row], len(values)) for row in rows.tolist()]
        return np.array(codes, np.int32), list(values)

    def _derived(self, name: str) -> NDArray[Any] | None:
        """Return a column that `_write_columns` computed from the others, if this manifest lies in such a file."""
        return None if self._file is None else self._file.get(name)

    @cached_property
    def usable(self) -> NDArray[np.int64]:
        """Row numbers of the videos that training may draw, ascending: int64 (usable,)."""
        if (rows := self._derived("usable")) is not None:
            return rows
        return np.concatenate([np.zeros(0, np.int64), *self._usable_blocks()])

    def usable_blocks(self) -> Iterator[NDArray[np.int64]]:
        """Yield `usable` in blocks, of which none needs much memory, for computations over all usable videos.

        Pages of the columns that are read between two blocks are given back.
        """
        for block in self._usable_blocks():
            yield block
            self.release()

    def _usable_blocks(self) -> Iterator[NDArray[np.int64]]:
        if (rows := self._derived("usable")) is not None:
            yield from (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
            return
        for start in range(0, len(self), BLOCK):
            if isinstance(self.left_out, Texts) and self.left_out.present is not None:
                usable = ~self.left_out.present[start : start + BLOCK]
            else:
                usable = np.array([reason is None for reason in self.left_out[start : start + BLOCK]], dtype=bool)
            yield np.flatnonzero(usable).astype(np.int64) + start

    @property
    def unusable(self) -> NDArray[np.int64]:
        """Row numbers of the videos that are left out, ascending: int64 (left out,)."""
        rows, start = [np.zeros(0, np.int64)], 0
        for usable in self._usable_blocks():
            if len(usable):
                stop = int(usable[-1]) + 1
                rows.append(np.setdiff1d(np.arange(start, stop), usable, assume_unique=True))
                start = stop
        return np.concatenate([*rows, np.arange(start, len(self))])

    @cached_property
    def kinds(self) -> dict[Kind, int]:
        """Number of usable videos of each kind."""
        if (known := self._derived("kinds")) is not None:
            return {Kind(*kind): count for *kind, count in json.loads(known.tobytes())}
        counts: Counter[Kind] = Counter()
        for rows in self.usable_blocks():
            chosen = _selection(rows)
            turned, height, width = self.rotation[chosen] % 180 != 0, self.height[chosen], self.width[chosen]
            texts = {name: self.codes(name, rows) for name in ("codec", "pixel_format", "colour")}
            columns: dict[str, NDArray[Any]] = {"still": self.still[chosen], "plain": self.plain[chosen]}
            columns |= {name: codes for name, (codes, _) in texts.items()}
            columns |= {"height": np.where(turned, width, height), "width": np.where(turned, height, width)}
            grouped = pa.table(columns).group_by(list(columns), use_threads=False).aggregate([([], "count_all")])
            for found in grouped.to_pylist():
                count = found.pop("count_all")
                counts[Kind(**found | {name: values[found[name]] for name, (_, values) in texts.items()})] += count
        return dict(counts)

    @property
    def dataset_sizes(self) -> list[int]:
        """Number of usable videos of each data set of a mixture, up to the last one that has any."""
        if self._file is not None and "dataset_sizes" in self._file.about:
            return list(self._file.about["dataset_sizes"])
        sizes = np.zeros(0, np.int64)
        for rows in self.usable_blocks():
            counts = np.bincount(self.dataset[_selection(rows)], minlength=len(sizes))
            counts[: len(sizes)] += sizes
            sizes = counts
        return [int(size) for size in sizes]

    def with_upright_stills(self) -> Self:
        """Manifest whose still images are displayed as their orientation tags (EXIF) say, not as they are coded."""
        if not any((chunk.to_numpy() != 1).any() for chunk in self.chunks("exif_orientation")):
            return self

        def chunks(name: str) -> Iterator[pa.Array]:
            return self._upright(name) if name in _ORIENTATION else self.chunks(name)

        return self.from_chunks(chunks, len(self), source=self.source, classes=self.classes, part=self.part)

    def _upright(self, name: str) -> Iterator[pa.Array]:
        """Column `name` of `_ORIENTATION`, in blocks, of still images set upright by their tags."""
        for start in range(0, len(self), BLOCK):
            stop = start + BLOCK
            column, tags = getattr(self, name)[start:stop].copy(), self.exif_orientation[start:stop]
            for tag in np.unique(tags).tolist():
                tagged = self.still[start:stop] & (tags == tag) & (tag != 1)
                rotation, mirrored = orientation_of_exif(tag)
                upright = {"rotation": rotation, "mirrored": mirrored, "exif_orientation": 1}
                if name in upright:
                    column[tagged] = upright[name]
                elif rotation % 180:
                    other = self.width if name == "height" else self.height
                    column[tagged] = other[start:stop][tagged]
            yield pa.array(column)
            self.release()

    @property
    def digest(self) -> str:
        """Hash of everything that the stream of clips depends on: 16 hexadecimal digits.

        It covers names, numbers of frames, sizes in pixels and data sets of the usable videos, but not their paths: a
        copy of the videos elsewhere, or in shards, has the same digest.
        """
        if self._file is not None and "digest" in self._file.about:
            return str(self._file.about["digest"])
        # No name becomes an object of Python: of millions, these would take longer than all else.
        digest, before = hashlib.sha256(), b""
        for rows in self.usable_blocks():
            if len(rows):
                digest.update(before)
                digest.update(joined_lines(_taken(self.name, rows)).data)
                before = b"\n"
        for column in (self.frames, self.height, self.width, self.dataset):
            for rows in self.usable_blocks():
                digest.update(np.ascontiguousarray(column[_selection(rows)]).data)
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write Parquet atomically: a reader sees the old file or the new one, never a part.

        A file that has the same content already stays as it is, with its time.
        """
        if self._parquet is not None and self._parquet.is_at(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        if self._parquet is not None and self._parquet.is_at(self._parquet.path):
            self._parquet.copy(new)
        else:
            self._write_parquet(new)
        if path.is_file() and filecmp.cmp(new, path, shallow=False):
            new.unlink()
        else:
            new.replace(path)

    def _write_parquet(self, path: Path) -> None:
        about = {"source": self.source, "classes": self.classes, "part": self.part}
        with _parquet_writer(str(path), about) as writer:
            self._write_to(writer)

    def _write_to(self, writer: pq.ParquetWriter) -> None:
        for chunks in zip(*(self.chunks(name) for name in SCHEMA.names), strict=True):
            columns = [
                _as_strings(chunk) if column.type == pa.string() else chunk
                for column, chunk in zip(SCHEMA, chunks, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=writer.schema))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a manifest that `save` wrote, from a file or an fsspec URL.

        The first process of a host that loads a large manifest writes its columns to a file of the temporary folder;
        it and all others map that file (`host_cache`).

        Raises:
            UserError: the file does not exist, is not Parquet, lacks a column, or changes while it is read.
        """
        source = ParquetSource.open(str(path), SCHEMA.names, _ORIGIN)
        about = _described(source.about)
        if source.rows < MAPPED_FROM:
            return cls.from_chunks(source.chunks, source.rows, **about)
        what = f"the manifest {path} of {source.rows} rows"
        if source.key is None:
            return cls._of_file(make_unnamed(what, lambda file: _write_columns(file, source.chunks, about)))

        def write(file: BinaryIO) -> None:
            _write_columns(file, source.chunks, about)
            source.check_unchanged()

        name = f"manifest-{source.key}-{_FORMAT}.columns"
        manifest = cls._of_file(open_or_make(name, what, write))
        object.__setattr__(manifest, "_parquet", source)
        return manifest


_FORMAT = 1
"""Number of the form in which `_write_columns` writes a manifest."""

_ORIENTATION = ("height", "width", "rotation", "mirrored", "exif_orientation")
"""Columns of the way in which a still image is displayed."""


def _write_columns(file: BinaryIO, chunks: Chunks, about: dict[str, Any]) -> None:
    """Write the columns of a manifest, and what follows from them, to a file of columns."""
    writer = ColumnWriter(file)
    for column in SCHEMA:
        name = column.name
        if name in _CATEGORIES:
            values: dict[str, int] = {}
            writer.add(name, (_numbered(chunk, values) for chunk in chunks(name)), np.int32)
            writer.add_bytes(f"{name}.values", json.dumps(list(values)).encode())
        elif column.type == pa.string():
            if name == "left_out":
                present = (chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in chunks(name))
                writer.add(f"{name}.present", present, np.bool_)
            writer.add_texts(name, lambda name=name: chunks(name))  # type: ignore[misc]
        else:
            writer.add(name, map(_as_numbers, chunks(name)), _dtype(name))
    manifest = Manifest._of_file(writer.preview(about))
    derived = {"digest": manifest.digest, "dataset_sizes": manifest.dataset_sizes}
    kinds = [[*kind, count] for kind, count in manifest.kinds.items()]
    writer.add_bytes("kinds", json.dumps(kinds).encode())
    writer.add("usable", manifest.usable_blocks(), np.int64)
    writer.finish(about | derived)


def _parquet_writer(path: str, about: dict[str, Any]) -> pq.ParquetWriter:
    schema = SCHEMA.with_metadata({_ORIGIN: json.dumps(about).encode()})
    return pq.ParquetWriter(path, schema, filesystem=LocalFileSystem())


def _described(about: dict[str, Any]) -> dict[str, Any]:
    """Fields `source`, `classes` and `part` of a manifest, from JSON that may lack those of the default."""
    part = about.get("part")
    return {
        "source": about.get("source", ""),
        "classes": tuple(about.get("classes", ())),
        "part": None if part is None else (part[0], part[1]),
    }


def _dtype(name: str) -> np.dtype[Any]:
    # `to_pandas_dtype` of older releases of pyarrow needs pandas.
    return pa.array([], SCHEMA.field(name).type).to_numpy(zero_copy_only=False).dtype


def _as_numbers(chunk: pa.Array) -> NDArray[Any]:
    return chunk.to_numpy(zero_copy_only=False)


def _as_strings(chunk: pa.Array) -> pa.Array:
    return chunk.cast(pa.large_string()).cast(pa.string()) if pa.types.is_large_binary(chunk.type) else chunk


def _numbered(chunk: pa.Array, values: dict[str, int]) -> NDArray[np.int32]:
    """Index of each text of a chunk in `values`, to which new ones are added: int32 (n,)."""
    encoded = chunk.dictionary_encode()
    texts = [
        text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        for text in encoded.dictionary.to_pylist()
    ]
    numbers = np.array([values.setdefault(text, len(values)) for text in texts], np.int32)
    return numbers[encoded.indices.to_numpy(zero_copy_only=False)] if len(chunk) else np.zeros(0, np.int32)


def _taken(texts: Sequence[str], rows: NDArray[np.int64]) -> pa.Array:
    """Texts of some rows, one or more, ascending, as binaries of Arrow."""
    if not isinstance(texts, Texts):
        return encode_texts(texts[row] for row in rows.tolist())
    block = texts.block(int(rows[0]), int(rows[-1]) + 1)
    return block if len(block) == len(rows) else block.take(pa.array(rows - rows[0]))


def _selection(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Index of some rows, ascending: a slice, which copies nothing, if none between them is missing."""
    whole = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
    return slice(int(rows[0]), int(rows[-1]) + 1) if whole else rows
