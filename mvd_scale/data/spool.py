"""Sequences that are too long for memory: they lie in files without a name, in the temporary folder of this host.

A value is one line of JSON, so that any file name is a value. Values are read in the order in which they were added.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import chain, islice
from typing import Any, Generic, Protocol, TypeVar

from mvd_scale.data.host_cache import open_unnamed

T = TypeVar("T")
S = TypeVar("S")
T_co = TypeVar("T_co", covariant=True)

IN_MEMORY = 1 << 15
"""Values up to which a sequence is a list, and number of texts that are sorted at a time."""

_PIECE = 1 << 14
"""Bytes that are read at a time."""


class Stored(Protocol[T_co]):
    """Values in memory or on disk, which can be gone through more than once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


class Mapped(Generic[S, T]):
    """Values of a function, computed anew whenever they are gone through.

    Args:
        function: the function.
        values: its arguments.
    """

    def __init__(self, function: Callable[[S], T], values: Stored[S]) -> None:
        self._function = function
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[T]:
        return map(self._function, self._values)


class Part(Generic[T]):
    """Values of a range of places.

    Args:
        values: all values.
        place: the range.
    """

    def __init__(self, values: Stored[T], place: range) -> None:
        self._values = values
        self._place = place

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[T]:
        return islice(iter(self._values), self._place.start, self._place.stop)


class _Lines:
    """File without a name whose lines are values of JSON."""

    def __init__(self) -> None:
        self._file = open_unnamed("a list of videos")
        self._end = 0

    def add(self, values: Iterable[Any]) -> range:
        """Append values, and return their number and place, of which `read` takes the bounds."""
        start = self._end
        for value in values:
            self._end += self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        return range(start, self._end)

    def read(self, place: range) -> Iterator[Any]:
        """Yield the values that lie between two bytes; a piece of the file is held at a time."""
        descriptor, rest = self._file.fileno(), b""
        for start in range(place.start, place.stop, _PIECE):
            piece = rest + os.pread(descriptor, min(_PIECE, place.stop - start), start)
            *lines, rest = piece.split(b"\n")
            yield from (json.loads(line.decode()) for line in lines)


class _Spool(Generic[T]):
    """Values on disk."""

    def __init__(self, values: Iterable[T], dump: Callable[[T], Any], load: Callable[[Any], T]) -> None:
        self._load = load
        self._count = 0
        self._lines = _Lines()
        self._place = self._lines.add(map(dump, self._counted(values)))

    def _counted(self, values: Iterable[T]) -> Iterator[T]:
        for value in values:
            self._count += 1
            yield value

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return map(self._load, self._lines.read(self._place))


def store(values: Iterable[T], dump: Callable[[T], Any], load: Callable[[Any], T]) -> Stored[T]:
    """Keep values: few of them in a list, many on disk.

    Args:
        values: the values, of which one at a time is held if there are many.
        dump: function from a value to what JSON can hold.
        load: its inverse.
    """
    coming = iter(values)
    first = list(islice(coming, IN_MEMORY))
    return first if len(first) < IN_MEMORY else _Spool(chain(first, coming), dump, load)


def store_texts(texts: Iterable[str]) -> Stored[str]:
    """Keep texts: few of them in a list, many on disk."""
    return store(texts, str, str)


def store_sorted(texts: Iterable[str]) -> Stored[str]:
    """Keep texts in ascending order: few of them in a list, many on disk, of which a share at a time is sorted."""
    coming = iter(texts)
    first = sorted(islice(coming, IN_MEMORY))
    if len(first) < IN_MEMORY:
        return first
    lines, runs = _Lines(), []
    while first:
        runs.append(lines.add(first))
        first = sorted(islice(coming, IN_MEMORY))
    return store_texts(merge(*map(lines.read, runs)))
