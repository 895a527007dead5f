"""Permutations by key: small ones in memory, large ones in a file that all processes of a host share.

The order of an epoch is a shuffle of numpy, of which no entry is known before all have been drawn: the first process of
a host that needs it draws it, the others map it (`host_cache`). Whoever draws it gets the same values, so that ranks,
workers, resumes and restarts need not agree on anything.
"""

from __future__ import annotations

from typing import BinaryIO, Protocol

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray

from mvd_scale.data.columns import BLOCK, ColumnFile, ColumnWriter
from mvd_scale.data.host_cache import open_or_make

SHARED_FROM = 50_000
"""Entries from which on a permutation is shared; a smaller one takes at most 0.2 MB in each process, which may hold
dozens of them (`sampler.round_order`)."""


class Permutation(Protocol):
    """Permutation of the numbers from 0 on: an array, or a mapped file."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> int: ...


def draw_permutation(key: tuple[int, ...], count: int) -> Permutation:
    """Draw the permutation of 0 .. count - 1 that a key determines: that of `Generator.permutation`."""
    if count < SHARED_FROM:
        return _draw(key, count)

    def write(file: BinaryIO) -> None:
        order = _draw(key, count)
        writer = ColumnWriter(file)
        writer.add("order", (order[start : start + BLOCK] for start in range(0, count, BLOCK)), order.dtype)
        writer.finish({})

    name = "-".join(map(str, (*key, count)))
    return _SharedPermutation(open_or_make(f"order-{name}.columns", f"an order of {count} clips", write))


def keyed_generator(key: tuple[int, ...]) -> Generator:
    """Create the random generator that a key determines."""
    return Generator(Philox(SeedSequence(key)))


def _draw(key: tuple[int, ...], count: int) -> NDArray[np.uint32 | np.uint64]:
    # `Generator.permutation` shuffles int64; the swaps do not depend on the type.
    order: NDArray[np.uint32 | np.uint64] = np.arange(count, dtype=np.uint32 if count <= 1 << 32 else np.uint64)
    keyed_generator(key).shuffle(order)
    return order


class _SharedPermutation:
    def __init__(self, file: ColumnFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return len(self._file["order"])

    def __getitem__(self, place: int, /) -> int:
        entry = int(self._file["order"][place])
        # Entries are drawn all over the file: their pages would soon be all of it.
        self._file.release()
        return entry
