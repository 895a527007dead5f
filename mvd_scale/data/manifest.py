"""What there is: one row per video, in Parquet."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mvd_scale.errors import UserError

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("frames", pa.int64()),
        ("fps", pa.float64()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("codec", pa.string()),
        ("label", pa.int64()),
        ("left_out", pa.string()),
    ]
)
_SOURCE = b"mvd_scale.source"


@dataclass(frozen=True)
class Manifest:
    """Every video of a source, also those that cannot be used, in the order of the source.

    Training never probes files: what it needs to know about a video stands here. A row number names a video
    wherever one is named (`ClipBatch.video_ids`, `quarantine.jsonl`).
    """

    path: list[str]
    """Absolute paths, so that a manifest may lie anywhere."""

    frames: NDArray[np.int64]
    """Frames that the container holds; 0 in a row that is left out. Each column has shape (videos,)."""

    fps: NDArray[np.float64]
    """Average frames per second; 0 where the container does not tell."""

    height: NDArray[np.int64]
    """Pixels, as coded."""

    width: NDArray[np.int64]
    """Pixels, as coded."""

    codec: list[str]
    """FFmpeg's name: h264, hevc, vp9 ..."""

    label: NDArray[np.int64]
    """Class; -1 if there is none."""

    left_out: list[str | None]
    """Why the video is not used; None if it is."""

    source: str
    """What was indexed (folder or annotation file) and the root it was read with: tells a cached manifest's origin."""

    def __len__(self) -> int:
        return len(self.path)

    @property
    def usable(self) -> NDArray[np.int64]:
        """Row numbers of the videos that training may draw, ascending: int64 (usable,)."""
        return np.array([row for row, reason in enumerate(self.left_out) if reason is None], dtype=np.int64)

    @property
    def digest(self) -> str:
        """What the stream of clips depends on: names, lengths and sizes of the usable videos, wherever they lie."""
        rows = self.usable
        digest = hashlib.sha256("\n".join(os.path.basename(self.path[row]) for row in rows).encode())
        for column in (self.frames, self.height, self.width):
            digest.update(column[rows].tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write Parquet; a reader sees the old file or the new one, never a part."""
        columns = [pa.array(getattr(self, field.name), field.type) for field in SCHEMA]
        table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata({_SOURCE: self.source.encode()}))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, it is not Parquet, or it lacks a column.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cannot read the manifest {path}: {error}. Expected a Parquet file that this program wrote; "
                "index the videos again"
            ) from error
        missing = [name for name in SCHEMA.names if name not in table.column_names]
        if missing:
            raise UserError(
                f"the manifest {path} lacks the columns {', '.join(missing)}: expected {', '.join(SCHEMA.names)}. "
                "Index the videos again"
            )
        source = (table.schema.metadata or {}).get(_SOURCE, b"").decode()
        return cls(
            path=table["path"].to_pylist(),
            frames=table["frames"].to_numpy(),
            fps=table["fps"].to_numpy(),
            height=table["height"].to_numpy(),
            width=table["width"].to_numpy(),
            codec=table["codec"].to_pylist(),
            label=table["label"].to_numpy(),
            left_out=table["left_out"].to_pylist(),
            source=source,
        )
