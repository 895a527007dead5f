"""Manifest: a table of videos, one row per video, stored as Parquet."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.fs import LocalFileSystem

from mvd_scale.data.orientation import orientation_of_exif
from mvd_scale.errors import UserError

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


@dataclass(frozen=True)
class Manifest:
    """All videos of a source in the order of the source, including those that cannot be used.

    Training never probes files: it takes all properties of a video from here. A video is identified by its row number
    everywhere (`ClipBatch.video_ids`, `quarantine.jsonl`). The columns are the fields of `Row`, one entry per video.
    """

    name: list[str]
    path: list[str]
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
    codec: list[str]
    pixel_format: list[str]
    colour: list[str]
    access: list[str]
    plain: NDArray[np.bool_]
    keyframe_interval: NDArray[np.int64]
    first_pts: NDArray[np.int64]
    pts_step: NDArray[np.int64]
    label: NDArray[np.int64]
    dataset: NDArray[np.int64]
    left_out: list[str | None]

    source: str = ""
    """Sources and options of the index, by which a cached manifest is recognised."""

    classes: tuple[str, ...] = ()
    """Names of the classes in the order of the labels; empty if the classes have no names."""

    part: tuple[int, int] | None = None
    """(3, 64) if the manifest holds the third of 64 equal parts of the source; None if it holds the whole source."""

    @classmethod
    def from_rows(cls, rows: Sequence[Row], **about: Any) -> Self:
        """Build a manifest from rows; `about` gives the fields `source`, `classes` and `part`."""
        columns: dict[str, Any] = {}
        for field in SCHEMA:
            values = [getattr(row, field.name) for row in rows]
            text = field.type == pa.string()
            # `to_pandas_dtype` of older releases of pyarrow needs pandas.
            dtype = pa.array([], field.type).to_numpy(zero_copy_only=False).dtype
            columns[field.name] = values if text else np.array(values, dtype)
        return cls(**columns, **about)

    def __len__(self) -> int:
        return len(self.path)

    def row(self, number: int) -> Row:
        """Row of one video, by its row number."""
        values = {field.name: getattr(self, field.name)[number] for field in fields(Row)}
        return Row(**{key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()})

    @property
    def rows(self) -> list[Row]:
        """Rows of all videos, in order."""
        return [self.row(number) for number in range(len(self))]

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Select rows by number, int64 (rows,), in any order, repetitions allowed."""
        columns: dict[str, Any] = {}
        for name in SCHEMA.names:
            column = getattr(self, name)
            columns[name] = [column[row] for row in rows.tolist()] if isinstance(column, list) else column[rows]
        return replace(self, **columns)

    @property
    def usable(self) -> NDArray[np.int64]:
        """Row numbers of the videos that training may draw, ascending: int64 (usable,)."""
        return np.array([row for row, reason in enumerate(self.left_out) if reason is None], dtype=np.int64)

    def with_upright_stills(self) -> Self:
        """Manifest whose still images are displayed as their orientation tags (EXIF) say, not as they are coded."""
        rows = [_upright(row) if row.still and row.exif_orientation != 1 else row for row in self.rows]
        return type(self).from_rows(rows, source=self.source, classes=self.classes, part=self.part)

    @property
    def digest(self) -> str:
        """Hash of everything that the stream of clips depends on: 16 hexadecimal digits.

        It covers names, numbers of frames, sizes in pixels and data sets of the usable videos, but not their paths: a
        copy of the videos elsewhere, or in shards, has the same digest.
        """
        rows = self.usable
        digest = hashlib.sha256("\n".join(self.name[row] for row in rows).encode())
        for column in (self.frames, self.height, self.width, self.dataset):
            digest.update(column[rows].tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write Parquet atomically: a reader sees the old file or the new one, never a part."""
        columns = [pa.array(getattr(self, field.name), field.type) for field in SCHEMA]
        about = {"source": self.source, "classes": self.classes, "part": self.part}
        table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata({_ORIGIN: json.dumps(about).encode()}))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a manifest that `save` wrote, from a file or an fsspec URL.

        Raises:
            UserError: the file does not exist, is not Parquet, or lacks a column.
        """
        try:
            table = _read_parquet(str(path))
        except (OSError, ImportError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cannot read the manifest {path}: {error}. Expected a Parquet file that this program wrote; "
                "index the videos again"
            ) from error
        about = json.loads((table.schema.metadata or {}).get(_ORIGIN, b"null"))
        missing = [name for name in SCHEMA.names if name not in table.column_names]
        if missing or about is None:
            raise UserError(
                f"the manifest {path} lacks {', '.join(missing) or 'its description'}: expected a file written by "
                "this release of `mvd-scale data index`. Index the videos again"
            )
        columns = {
            field.name: table[field.name].to_pylist() if field.type == pa.string() else table[field.name].to_numpy()
            for field in SCHEMA
        }
        part = None if about["part"] is None else (about["part"][0], about["part"][1])
        return cls(**columns, source=about["source"], classes=tuple(about["classes"]), part=part)


def _upright(still: Row) -> Row:
    rotation, mirrored = orientation_of_exif(still.exif_orientation)
    height, width = (still.width, still.height) if rotation % 180 else (still.height, still.width)
    # Without its tag, the row stays as it is if it is set upright again.
    return replace(still, rotation=rotation, mirrored=mirrored, height=height, width=width, exif_orientation=1)


def _read_parquet(path: str) -> pa.Table:
    """Read a file by its path, and a URL through memory.

    Arrow's threads never get a file object of Python: one of them may still hold it when the interpreter ends, and
    aborts the process.
    """
    if "://" not in path:
        return pq.read_table(path, filesystem=LocalFileSystem())
    with fsspec.open(path, "rb") as file:
        return pq.read_table(pa.BufferReader(file.read()))
