"""Files of columns that all processes of a host map for reading, and texts in such columns.

    magic | column | column | ... | footer (JSON) | bytes of the footer, uint64 | magic

A column is one array in the machine's byte order, aligned to 64 bytes; one whose values are all equal is stored as a
single value. A file without its end is torn, and refused. Processes share the pages of the file; a process keeps none
of them after `ColumnFile.release`.

Workers import this module: it must not import torch.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import DTypeLike, NDArray

BLOCK = 1 << 16
"""Entries of a column that are read or written at a time."""

_MAGIC = b"MVDCOLS1"
_ALIGNMENT = 64


class TornFileError(Exception):
    """A file of columns lacks its end, or parts of it."""


class ColumnFile:
    """Columns of one file, mapped for reading. Picklable: another process of this host maps the same file.

    The pickle names the open file of this process, not a path: it is valid while this object lives, and also if the
    file has no name (any more).

    Args:
        descriptor: open file, which this object closes at its end.

    Raises:
        TornFileError: the file is not whole.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.size = os.fstat(descriptor).st_size
        """Size of the file in bytes."""
        if self.size < 2 * len(_MAGIC) + 8:
            raise TornFileError
        self._map = mmap.mmap(descriptor, self.size, prot=mmap.PROT_READ)
        end = self.size - len(_MAGIC) - 8
        start = end - int.from_bytes(self._map[end : end + 8], "little")
        if self._map[: len(_MAGIC)] != _MAGIC or self._map[-len(_MAGIC) :] != _MAGIC or start < len(_MAGIC):
            raise TornFileError
        footer = json.loads(self._map[start:end])
        self.about: dict[str, Any] = footer["about"]
        """Description of the columns by their writer."""
        self._columns = {name: self._column(**column) for name, column in footer["columns"].items()}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ColumnFile:
        """Map a file by its path.

        Raises:
            OSError: it cannot be opened.
            TornFileError: it is not whole.
        """
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def _column(self, dtype: str, shape: list[int], offset: int, constant: bool) -> NDArray[Any]:
        count = 1 if constant else int(np.prod(shape))
        column = np.frombuffer(self._map, dtype, count, offset)
        return np.broadcast_to(column, shape) if constant else column.reshape(shape)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def get(self, name: str) -> NDArray[Any] | None:
        """Return a column, or None if the file has none of that name."""
        return self._columns.get(name)

    def release(self) -> None:
        """Give the pages that were read back to the system; what is read next is mapped again.

        The system counts pages that no other process maps as private memory of this one.
        """
        self._map.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple[Callable[..., ColumnFile], tuple[int, int, tuple[int, int]]]:
        return _open_of_process, (os.getpid(), self._descriptor, _identity(self._descriptor))


def _open_of_process(process: int, descriptor: int, identity: tuple[int, int]) -> ColumnFile:
    """Map the file that another process of this host has open.

    Raises:
        OSError: that process has ended, or closed it.
    """
    path = f"/proc/{process}/fd/{descriptor}"
    columns = ColumnFile.open(path)
    if _identity(columns._descriptor) != identity:
        raise FileNotFoundError(f"{path} is no longer the file of columns that it was")
    return columns


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


class ColumnWriter:
    """Writer of a file of columns, one column after the other, in chunks: it holds one chunk at a time.

    Args:
        file: empty file, open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._columns: dict[str, dict[str, Any]] = {}
        file.write(_MAGIC)

    def add(self, name: str, chunks: Iterable[NDArray[Any]], dtype: DTypeLike) -> None:
        """Write a column from its chunks along the first axis."""
        offset = self._align()
        dtype, length, rest, first = np.dtype(dtype), 0, None, None
        constant = True
        for chunk in chunks:
            chunk = np.ascontiguousarray(chunk, dtype)
            rest = chunk.shape[1:]
            if not chunk.size:
                continue
            first = chunk.flat[0] if first is None else first
            constant = constant and bool((chunk == first).all())
            length += len(chunk)
            self._file.write(chunk.data)
        constant = constant and length > 0
        if constant:
            self._file.seek(offset + dtype.itemsize)
            self._file.truncate()
        shape = [length, *(rest or ())]
        self._columns[name] = {"dtype": dtype.str, "shape": shape, "offset": offset, "constant": constant}

    def add_texts(self, name: str, chunks: Callable[[], Iterable[pa.Array]]) -> None:
        """Write a column of texts, `Texts`, in two passes over its chunks: strings or binaries of Arrow."""
        self.add(f"{name}.ends", _ends(chunks()), np.int64)
        self.add(f"{name}.bytes", (_encoded(chunk)[1] for chunk in chunks()), np.uint8)

    def add_bytes(self, name: str, content: bytes) -> None:
        """Write a column of bytes, uint8 (bytes,)."""
        self.add(name, [np.frombuffer(content, np.uint8)], np.uint8)

    def preview(self, about: dict[str, Any]) -> ColumnFile:
        """Map the columns that are written so far, from which others may be computed; see `finish`."""
        place = self._file.tell()
        self.finish(about)
        written = ColumnFile.open(f"/proc/self/fd/{self._file.fileno()}")
        self._file.seek(place)
        self._file.truncate()
        return written

    def finish(self, about: dict[str, Any]) -> None:
        """Write the footer with a description of the columns, which can be serialised as JSON."""
        footer = json.dumps({"about": about, "columns": self._columns}).encode()
        self._align()
        self._file.write(footer + len(footer).to_bytes(8, "little") + _MAGIC)
        self._file.flush()

    def _align(self) -> int:
        place = self._file.tell()
        self._file.write(bytes(-place % _ALIGNMENT))
        return self._file.tell()


def in_memory(write: Callable[[BinaryIO], None]) -> ColumnFile:
    """Write columns to memory that this process shares with those that unpickle the result; it ends with the last."""
    descriptor = os.memfd_create("mvd_scale", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            write(file)
    except BaseException:
        os.close(descriptor)
        raise
    return ColumnFile(descriptor)


def share(**arrays: NDArray[Any]) -> ColumnFile:
    """Put arrays in memory that workers map instead of each getting a copy."""

    def write(file: BinaryIO) -> None:
        writer = ColumnWriter(file)
        for name, array in arrays.items():
            writer.add(name, [array], array.dtype)
        writer.finish({})

    return in_memory(write)


class Texts(Sequence[Any]):
    """Texts in one buffer: UTF-8, lone surrogates escaped.

    Args:
        ends: end of each text in `encoded`, int64 (N,).
        encoded: the texts one after the other, uint8 (bytes,).
        present: whether there is a text, or None, bool (N,); all are there without it.
    """

    def __init__(
        self, ends: NDArray[np.int64], encoded: NDArray[np.uint8], present: NDArray[Any] | None = None
    ) -> None:
        self._ends = ends
        self._encoded = encoded
        self.present = present

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> list[Any]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        number = range(len(self))[row]
        if self.present is not None and not self.present[number]:
            return None
        start = int(self._ends[number - 1]) if number else 0
        return self._encoded[start : int(self._ends[number])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), BLOCK):
            yield from (
                None if text is None else text.decode("utf-8", "surrogateescape")
                for text in self.block(start, start + BLOCK).to_pylist()
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def block(self, start: int, stop: int) -> pa.Array:
        """Return texts start .. stop - 1 as binaries of Arrow, which refer to the bytes as they lie."""
        ends = self._ends[start:stop]
        first = int(self._ends[start - 1]) if start else 0
        last = int(ends[-1]) if len(ends) else first
        offsets = np.concatenate([[0], ends - first]).astype(np.int64)
        valid = None
        if self.present is not None:
            valid = pa.array(self.present[start:stop].astype(bool)).buffers()[1]
        data = np.ascontiguousarray(self._encoded[first:last])
        buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(data)]
        return pa.Array.from_buffers(pa.large_binary(), len(ends), buffers)


class Categories(Sequence[str]):
    """Texts of which only few differ: a number for each, and the differing texts.

    Args:
        codes: index into `values` of each text, int32 (N,).
        values: texts that differ.
    """

    def __init__(self, codes: NDArray[np.int32], values: list[str]) -> None:
        self.codes = codes
        self.values = values

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self.values[code] for code in self.codes[row].tolist()]
        return self.values[self.codes[row]]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def encode_texts(texts: Iterable[str | None]) -> pa.Array:
    """Binaries of Arrow of texts; lone surrogates, which UTF-8 does not have, are escaped."""
    encoded = [None if text is None else text.encode("utf-8", "surrogateescape") for text in texts]
    return pa.array(encoded, pa.large_binary())


def joined_lines(texts: pa.Array) -> NDArray[np.uint8]:
    """Bytes of binaries of Arrow, one or more, with a newline between two of them: uint8 (bytes,)."""
    ended = pc.binary_join_element_wise(texts, *(pa.scalar(text, pa.large_binary()) for text in (b"", b"\n")))
    return _encoded(ended)[1][:-1]


def _encoded(chunk: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Offsets, int64 (n + 1,), and bytes of Arrow's texts; a missing text is empty."""
    binary = chunk.cast(pa.large_binary()).fill_null(b"")
    _, offsets, data = binary.buffers()
    places = np.frombuffer(offsets, np.int64)[binary.offset : binary.offset + len(binary) + 1]
    if not len(places):
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    held = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return places, held[places[0] : places[-1]]


def _ends(chunks: Iterable[pa.Array]) -> Iterator[NDArray[np.int64]]:
    total = 0
    for chunk in chunks:
        places, _ = _encoded(chunk)
        yield places[1:] - places[0] + total
        total += int(places[-1] - places[0])
