"""Parquet files that are read column by column, in blocks, and a key of their content.

Arrow's threads never get a file object of Python: one of them may still hold it when the interpreter ends, and aborts
the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from mvd_scale.data.columns import BLOCK
from mvd_scale.errors import UserError


@dataclass(frozen=True)
class ParquetSource:
    """Parquet file of a manifest."""

    path: str
    """Path or URL, for messages."""

    rows: int

    about: dict[str, Any]
    """Description of the rows, from the metadata of the file."""

    key: str | None
    """Hash of size, modification time and footer, which has the bounds of every column; None for a URL."""

    _file: pq.ParquetFile

    @classmethod
    def open(cls, path: str, columns: Sequence[str], metadata: bytes) -> ParquetSource:
        """Open a file, or an fsspec URL by a copy of it without a name.

        Args:
            path: path or URL.
            columns: columns that the file must have.
            metadata: key of the description in the file's metadata.

        Raises:
            UserError: the file does not exist, is not Parquet, or lacks a column or its description.
        """
        try:
            key = None if "://" in path else _key(path)
            file = _open(path)
        except (OSError, ImportError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cannot read the manifest {path}: {error}. Expected a Parquet file that this program wrote; "
                "index the videos again"
            ) from error
        about = json.loads((file.schema_arrow.metadata or {}).get(metadata, b"null"))
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing or about is None:
            raise UserError(
                f"the manifest {path} lacks {', '.join(missing) or 'its description'}: expected a file written by "
                "this release of `mvd-scale data index`. Index the videos again"
            )
        return cls(path, file.metadata.num_rows, about, key, file)

    def chunks(self, name: str) -> Iterator[pa.Array]:
        """Values of a column, in blocks.

        Raises:
            UserError: the file is damaged.
        """
        try:
            for batch in self._file.iter_batches(BLOCK, columns=[name], use_threads=False):
                yield batch.column(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"cannot read the manifest {self.path}: {error}. Expected a Parquet file that this program wrote; "
                "index the videos again"
            ) from error

    def is_at(self, path: str | Path) -> bool:
        """Whether a path leads to the file that was opened, unchanged, or to a `copy` of it."""
        try:
            return self.key is not None and _key(str(path)) == self.key
        except OSError:
            return False

    def copy(self, path: Path) -> None:
        """Copy the file with its time, so that the copy has its key."""
        shutil.copyfile(self.path, path)
        status = os.stat(self.path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def check_unchanged(self) -> None:
        """Check that the file was not written to or replaced meanwhile.

        Raises:
            UserError: it was.
        """
        if not self.is_at(self.path):
            raise UserError(f"the manifest {self.path} changed while it was read: start the command again")


def _open(path: str) -> pq.ParquetFile:
    if "://" not in path:
        return pq.ParquetFile(path, filesystem=LocalFileSystem())
    with tempfile.TemporaryFile() as copy:
        with fsspec.open(path, "rb") as remote:
            while piece := remote.read(1 << 24):
                copy.write(piece)
        copy.flush()
        return pq.ParquetFile(f"/proc/self/fd/{copy.fileno()}", filesystem=LocalFileSystem())


def _key(path: str) -> str:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        # The file ends with the length of the footer, uint32, and a magic number of 4 bytes.
        file.seek(max(status.st_size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(status.st_size - 8 - length, 0))
        digest = hashlib.sha256(file.read(length))
    digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
