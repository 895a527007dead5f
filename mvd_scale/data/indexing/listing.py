"""A list of videos with their labels, before any video is opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from mvd_scale.data.manifest import Row
from mvd_scale.data.spool import Stored, store


@dataclass(frozen=True)
class Listing:
    """Videos of which only name, path (with offset and size in a tar file) and label are known."""

    rows: Stored[Row]
    """The videos; many of them lie on disk, see `store_rows`."""

    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListOptions:
    """Properties of a list that the list itself does not state."""

    root: str | None = None
    """Folder or URL to which the paths of a list are relative; the folder of the list if None."""

    classes: str | None = None
    """File with the class names (`classInd.txt`, `labels.json`); searched in the folder of the list if None."""

    split: str | None = None
    """Split to take from a list that holds several: train, validation or test; None for all."""

    fold: int = 1
    """Official split of HMDB51: 1, 2 or 3."""


def store_rows(rows: Iterable[Row]) -> Stored[Row]:
    """Keep the rows of a listing: few of them in a list, many on disk."""
    return store(rows, attrgetter(*_LISTED), lambda values: Row(**dict(zip(_LISTED, values, strict=True))))


_LISTED = ("name", "path", "label", "offset", "size", "left_out")
"""Fields of the rows of a listing that may differ from their defaults."""
