"""A list of videos with their labels, before any video is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mvd_scale.data.manifest import Row


@dataclass(frozen=True)
class Listing:
    """Videos of which only name, path (with offset and size in a tar file) and label are known."""

    rows: list[Row]
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


def merge_listings(listings: Sequence[Listing]) -> Listing:
    """Concatenate listings; classes of the same name become one class, and labels are renumbered accordingly."""
    classes = tuple(dict.fromkeys(name for listing in listings for name in listing.classes))
    number = {name: label for label, name in enumerate(classes)}
    rows = [
        replace(row, label=number[listing.classes[row.label]]) if row.label >= 0 else row
        for listing in listings
        for row in listing.rows
    ]
    return Listing(rows, classes)
