"""What there is: one row per video, in Parquet."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from typing_extensions import Self

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
        ("codec", pa.string()),
        ("pixel_format", pa.string()),
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
"""`offset` of a video that is a file by itself, not a part of a shard."""

IMAGE_CODECS = frozenset({"jpeg", "png", "bmp", "tiff", "webp"})
"""`codec` of still images: clips of one frame."""


@dataclass(frozen=True)
class Row:
    """One video, as one row of a manifest."""

    name: str
    """What the video is called in its source: its path from there. The same in files and in shards."""

    path: str
    """Absolute path or URL of the file, or of the shard that holds it."""

    label: int = -1
    """Class; -1 if there is none."""

    offset: int = WHOLE_FILE
    """First byte within a shard; -1 if the video is a file by itself."""

    size: int = 0
    """Bytes."""

    frames: int = 0
    """Frames that the container holds; 0 in a row that is left out."""

    fps: float = 0.0
    """Average frames per second; 0 where the container does not tell."""

    variable_rate: bool = False
    """Whether frames are not equally long."""

    duration: float = 0.0
    """Seconds."""

    height: int = 0
    """Pixels, as shown: after `rotation`."""

    width: int = 0
    """Pixels, as shown: after `rotation`."""

    rotation: int = 0
    """Degrees by which a coded frame is turned counterclockwise to be shown: 0, 90, 180 or 270."""

    codec: str = ""
    """FFmpeg's name: h264, hevc, vp9 ...; of a still image one of `IMAGE_CODECS`."""

    pixel_format: str = ""
    """FFmpeg's name: yuv420p, yuv420p10le ..."""

    keyframe_interval: int = 0
    """Largest number of frames from a keyframe to the next, or to the end."""

    first_pts: int = 0
    """Presentation time of the first frame, in ticks of the stream."""

    pts_step: int = 0
    """Ticks from every frame to the next; 0 where they differ or are not known, and places must be counted."""

    dataset: int = 0
    """Which part of a mixture the video belongs to."""

    left_out: str | None = None
    """Why the video is not used; None if it is."""

    @property
    def coded_size(self) -> tuple[int, int]:
        """Height and width of a frame as decoders give it, before `rotation`."""
        return (self.width, self.height) if self.rotation % 180 else (self.height, self.width)


@dataclass(frozen=True)
class Manifest:
    """Every video of a source, also those that cannot be used, in the order of the source.

    Training never probes files: what it needs to know about a video stands here. A row number names a video
    wherever one is named (`ClipBatch.video_ids`, `quarantine.jsonl`). Columns are what `Row` says, one entry a video.
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
    codec: list[str]
    pixel_format: list[str]
    keyframe_interval: NDArray[np.int64]
    first_pts: NDArray[np.int64]
    pts_step: NDArray[np.int64]
    label: NDArray[np.int64]
    dataset: NDArray[np.int64]
    left_out: list[str | None]

    source: str = ""
    """What was indexed, and how: tells a cached manifest's origin."""

    classes: tuple[str, ...] = ()
    """Name of every class, in the order of the labels; empty if they have none."""

    part: tuple[int, int] | None = None
    """(3, 64) if these are the videos of the third of 64 equal parts of the source."""

    @classmethod
    def of(cls, rows: Sequence[Row], **about: Any) -> Self:
        """A manifest of single rows; `about` is `source`, `classes` and `part`."""
        columns: dict[str, Any] = {}
        for field in SCHEMA:
            values = [getattr(row, field.name) for row in rows]
            text = field.type == pa.string()
            columns[field.name] = values if text else np.array(values, field.type.to_pandas_dtype())
        return cls(**columns, **about)

    def __len__(self) -> int:
        return len(self.path)

    def row(self, number: int) -> Row:
        """One video."""
        values = {field.name: getattr(self, field.name)[number] for field in fields(Row)}
        return Row(**{key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()})

    @property
    def rows(self) -> list[Row]:
        """All videos."""
        return [self.row(number) for number in range(len(self))]

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Some of the videos, in any order and as often as one likes."""
        columns: dict[str, Any] = {}
        for name in SCHEMA.names:
            column = getattr(self, name)
            columns[name] = [column[row] for row in rows.tolist()] if isinstance(column, list) else column[rows]
        return replace(self, **columns)

    @property
    def usable(self) -> NDArray[np.int64]:
        """Row numbers of the videos that training may draw, ascending: int64 (usable,)."""
        return np.array([row for row, reason in enumerate(self.left_out) if reason is None], dtype=np.int64)

    @property
    def digest(self) -> str:
        """What the stream of clips depends on: names, lengths and sizes of the usable videos, wherever they lie."""
        rows = self.usable
        digest = hashlib.sha256("\n".join(self.name[row] for row in rows).encode())
        for column in (self.frames, self.height, self.width, self.dataset):
            digest.update(column[rows].tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write Parquet; a reader sees the old file or the new one, never a part."""
        columns = [pa.array(getattr(self, field.name), field.type) for field in SCHEMA]
        about = {"source": self.source, "classes": self.classes, "part": self.part}
        table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata({_ORIGIN: json.dumps(about).encode()}))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote, from a file or an fsspec URL.

        Raises:
            UserError: there is no such file, it is not Parquet, or it lacks a column.
        """
        try:
            with fsspec.open(str(path), "rb") as file:
                table = pq.read_table(file)
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
