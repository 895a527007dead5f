"""Journal of an index: the row of each video that is probed, in a file, so that an interrupted index resumes.

    options, one line of JSON
    [key of a video, its row], one line of JSON each

A journal made with other options is overwritten; a line that is incomplete, because the process was killed while
writing it, is skipped. No row is held in memory: those of earlier runs are found by a hash of their key, in sorted runs
that lie in a file as well.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.columns import ColumnFile, ColumnWriter
from mvd_scale.data.host_cache import make_unnamed, open_unnamed
from mvd_scale.data.manifest import Row

RUN = 1 << 18
"""Lines whose hashes are sorted at a time."""

_BYTES = 8
"""Bytes of a place."""

_LINE = 2048
"""Bytes that are read for a line, which is seldom longer."""


class Places:
    """Places of rows in a journal, by the numbers of their videos from 0, in a file without a name."""

    def __init__(self) -> None:
        self._file = open_unnamed("the places of the rows in a journal")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def note(self, numbers: Iterable[int], places: Iterable[int]) -> None:
        """Keep the places of some rows, in any order."""
        for number, place in zip(numbers, places, strict=True):
            os.pwrite(self._file.fileno(), place.to_bytes(_BYTES, "little"), _BYTES * number)

    def __iter__(self) -> Iterator[int]:
        self._file.seek(0)
        while place := self._file.read(_BYTES):
            yield int.from_bytes(place, "little")


class Journal:
    """Rows of the videos that are probed, by their place in the file.

    Args:
        path: the file; None for one without a name.
        options: what the rows depend on besides their videos.
    """

    def __init__(self, path: Path | None, options: dict[str, object]) -> None:
        self._path = path
        self._head = json.dumps(options).encode() + b"\n"
        self._file: BinaryIO
        self._known: ColumnFile | None = None
        self._runs: list[range] = []

    def __enter__(self) -> Self:
        if self._path is None:
            self._file = open_unnamed("the journal of an index")
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
            self._file.seek(0)
        if self._path is not None and self._file.readline() == self._head:
            self._known = make_unnamed(f"what the journal {self._path} has", self._write_known)
            # The last line may be incomplete: the newline keeps the next record apart from it.
            self._append(b"\n")
        else:
            self._file.truncate(0)
            self._append(self._head)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def find(self, keys: Sequence[str]) -> list[int | None]:
        """Find the places of the rows that earlier runs recorded, by key; None for one that they did not."""
        places: list[int | None] = [None] * len(keys)
        if self._known is None:
            return places
        lines = [json.dumps(key).encode() for key in keys]
        hashes, entries = np.array([_hash(line) for line in lines], np.int64), self._known["entries"]
        for run in self._runs:
            sorted_hashes, run_places = np.split(entries[run.start : run.stop], 2)
            at = np.searchsorted(sorted_hashes, hashes, side="right") - 1
            for number in np.flatnonzero((at >= 0) & (sorted_hashes[at] == hashes)).tolist():
                place, begin = int(run_places[at[number]]), b"[" + lines[number] + b", "
                # Of several records of a video, the last one counts.
                if os.pread(self._file.fileno(), len(begin), place) == begin:
                    places[number] = place
        self._known.release()
        return places

    def add(self, keys: Sequence[str], rows: Sequence[Row]) -> list[int]:
        """Append the rows of probed videos, and return their places."""
        lines = [json.dumps([key, vars(row)]).encode() + b"\n" for key, row in zip(keys, rows, strict=True)]
        start = self._append(b"".join(lines))
        ends = np.cumsum([len(line) for line in lines]).tolist()
        return [start + end - len(line) for end, line in zip(ends, lines, strict=True)]

    def row(self, place: int, **others: Any) -> Row:
        """Read a row by its place; `others` replace fields of it."""
        line, size = b"", _LINE
        while b"\n" not in line:
            line = os.pread(self._file.fileno(), size, place)
            size *= 2
        _, row = json.loads(line.partition(b"\n")[0].decode())
        return Row(**{**row, **others})

    def _append(self, lines: bytes) -> int:
        """Append lines, and return the place of the first."""
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(lines)
        self._file.flush()
        return start

    def _write_known(self, file: BinaryIO) -> None:
        writer = ColumnWriter(file)
        writer.add("entries", self._sorted_runs(), np.int64)
        writer.finish({})

    def _sorted_runs(self) -> Iterator[NDArray[np.int64]]:
        """Yield hashes, ascending, and places of some lines after the other: int64 (2 x lines,)."""
        self._runs, hashes, places = [], array("q"), array("q")
        place = self._file.seek(len(self._head))
        for line in self._file:
            try:
                key, _ = json.loads(line)
            except ValueError:
                pass
            else:
                hashes.append(_hash(json.dumps(key).encode()))
                places.append(place)
            place += len(line)
            if len(hashes) == RUN:
                yield self._sorted_run(hashes, places)
                hashes, places = array("q"), array("q")
        if hashes:
            yield self._sorted_run(hashes, places)

    def _sorted_run(self, hashes: array[int], places: array[int]) -> NDArray[np.int64]:
        start = self._runs[-1].stop if self._runs else 0
        self._runs.append(range(start, start + 2 * len(hashes)))
        order = np.argsort(np.array(hashes, np.int64), kind="stable")
        return np.concatenate([np.array(hashes, np.int64)[order], np.array(places, np.int64)[order]])


def _hash(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little", signed=True)
