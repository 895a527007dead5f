"""Listing of the videos of a source: names, paths and labels, before any file is opened.

folder, glob, single file -> every video and still image in it; labels from class folders
text, csv, json           -> lists in the formats of public data sets, see `dataset_lists.py`
tar                       -> members that are videos or still images, see `tars.py`

Files that are hidden or made by a system are nothing (`filesystem.is_nothing`); of other files that are not taken, the
log has the number.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from glob import has_magic, iglob

from mvd_scale.data.filesystem import (
    MEDIA_SUFFIXES,
    count_by_kind,
    exists,
    find_files,
    is_dir,
    is_media,
    is_nothing,
    relative,
)
from mvd_scale.data.indexing.listing import Listing, ListOptions, store_rows
from mvd_scale.data.manifest import Row
from mvd_scale.data.spool import Mapped, Stored, store_sorted, store_texts
from mvd_scale.data.storage import absolute, filesystem_of, is_url
from mvd_scale.errors import UserError

log = logging.getLogger("mvd_scale")

LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".json", ".list"})

_PACKED = frozenset({".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".rar", ".7z", ".xlsx"})

SOURCE_FORMS = (
    "a folder, a glob, a video, a list (`path label` lines; a csv; the lists of Kinetics, "
    "Something-Something, UCF101 and HMDB51), a tar file, or an fsspec URL of one of these"
)


def list_videos(sources: Sequence[str], options: ListOptions) -> Listing:
    """List all videos of some sources, one source after the other.

    Raises:
        UserError: a source does not exist, holds no videos, or is of no known form; or some sources have class names
            and others have labels without names.
    """
    if len(sources) == 1:
        return _list_one(sources[0], options)
    number: dict[str, int] = {}
    named, numbered = [], []

    def rows() -> Iterator[Row]:
        """Yield the rows of one listing after the other; classes of the same name become one class."""
        for source in sources:
            listing = _list_one(source, options)
            labels = [number.setdefault(name, len(number)) for name in listing.classes]
            named.append(bool(labels))
            numbered.append(False)
            for row in listing.rows:
                if labels and row.label >= 0:
                    row = replace(row, label=labels[row.label])
                numbered[-1] |= not labels and row.label >= 0
                yield row

    listed = store_rows(rows())
    if any(named) and any(numbered):
        raise UserError(
            f"{sources[named.index(True)]} has class names, but {sources[named.index(False)]} has class numbers only: "
            "their labels cannot be combined in one manifest. Index each source into a manifest of its own"
        )
    return Listing(listed, tuple(number))


def _list_one(source: str, options: ListOptions) -> Listing:
    from mvd_scale.data.indexing.dataset_lists import list_folds, read_list
    from mvd_scale.data.indexing.tars import list_tar

    suffix = posixpath.splitext(source)[1].lower()
    if is_dir(source):
        folds = find_files(source, _is_fold)
        return list_folds(list(folds), source, options) if folds else _list_folder(source)
    if has_magic(source) and not exists(source):
        paths = _glob(source)
        if not paths:
            raise UserError(f"no file matches {source}: expected a pattern such as 'videos/*/*.mp4', in quotes")
        if all(_is_fold(path) for path in paths):
            return list_folds(list(paths), posixpath.dirname(source), options)
        if all(is_media(path) and not is_dir(path) for path in paths):
            return list_paths(paths, _fixed_part(source))
        return list_videos(list(paths), options)
    if not exists(source):
        raise UserError(f"data.source {source} does not exist: expected a manifest (.parquet), or {SOURCE_FORMS}")
    if suffix == ".tar":
        return list_tar(source)
    if suffix in LIST_SUFFIXES:
        if _is_fold(source):
            return list_folds([source], posixpath.dirname(source), options)
        return read_list(source, options)
    if suffix in MEDIA_SUFFIXES:
        return Listing([Row(name=posixpath.basename(source), path=absolute(source))])
    remedy = ". Unpack it first: videos are read by their places in a file" if suffix in _PACKED else ""
    raise UserError(f"{source} cannot be indexed: expected {SOURCE_FORMS}{remedy}")


def _list_folder(folder: str) -> Listing:
    """Videos below a folder, sorted by name; with labels if every video lies in a sub-folder, which names its class."""
    files = find_files(folder, lambda _: True)
    paths = store_texts(path for path in files if is_media(path))
    others = count_by_kind(path for path in files if not is_media(path))
    if not paths:
        holds = f", which holds {others}" if others else ""
        raise UserError(
            f"no videos in the folder {folder}{holds}: expected files with one of the suffixes "
            f"{' '.join(sorted(MEDIA_SUFFIXES))} in it or in its sub-folders. Give the folder that holds the videos, "
            f"or, of tar files or lists, a quoted pattern of them such as '{folder}/*.tar'"
        )
    if others:
        log.info("%d files of %s are not taken, by their suffixes: %s", len(files) - len(paths), folder, others)
    return list_paths(paths, folder)


def list_paths(paths: Iterable[str], folder: str) -> Listing:
    """Videos at some paths, named relative to a folder, with labels if every one lies in a class folder."""
    rows = store_rows(_with_valid_name(Row(name=relative(path, folder), path=absolute(path))) for path in paths)
    if not all("/" in row.name for row in rows):
        return Listing(rows)
    classes = sorted({_class(row) for row in rows})
    number = {name: label for label, name in enumerate(classes)}
    return Listing(Mapped(lambda row: replace(row, label=number[_class(row)]), rows), tuple(classes))


def _class(row: Row) -> str:
    """Name of the class folder of a video."""
    return row.name.split("/")[0]


def _with_valid_name(row: Row) -> Row:
    """Row that Parquet can store: a file name that is not UTF-8 is replaced by a readable one, and left out."""
    try:
        f"{row.name}{row.path}".encode()
    except UnicodeEncodeError:
        readable = [text.encode(errors="replace").decode() for text in (row.name, row.path)]
        return replace(row, name=readable[0], path=readable[1], left_out="its name is not valid UTF-8: rename the file")
    return row


def _glob(pattern: str) -> Stored[str]:
    """Paths that match a pattern, sorted; those that are nothing only if the pattern has their names.

    Of a pattern at a URL, fsspec holds all paths while it lists.
    """
    if is_url(pattern):
        filesystem, inner = filesystem_of(pattern)
        paths = (str(filesystem.unstrip_protocol(path)) for path in filesystem.glob(inner))
        return store_sorted(path for path in paths if not is_nothing(relative(path, _fixed_part(pattern))))
    start = _fixed_part(pattern)
    wished = "/." in pattern.removeprefix(start)
    matching = (path for path in iglob(pattern, recursive=True) if wished or not is_nothing(path.removeprefix(start)))
    found = store_sorted(matching)
    if "**" not in pattern:
        return found
    # A link to a parent folder leads to the same folder by many paths: the shortest one is meant.
    real: dict[str, str] = {}
    for folder in sorted({posixpath.dirname(path) for path in found}, key=lambda name: (name.count("/"), name)):
        real.setdefault(os.path.realpath(folder), folder)
    meant = set(real.values())
    return store_texts(path for path in found if posixpath.dirname(path) in meant)


def _fixed_part(pattern: str) -> str:
    """The folders at the beginning of a glob that have no magic; the current folder if there are none."""
    found = re.search(r"[*?\[]", pattern)
    assert found is not None
    return posixpath.dirname(pattern[: found.start()]) or "."


def _is_fold(path: str) -> bool:
    """Whether a path is a file of HMDB51's official splits, such as `brush_hair_test_split1.txt`."""
    stem, suffix = posixpath.splitext(posixpath.basename(path))
    return suffix == ".txt" and stem[:-1].endswith("_test_split") and stem[-1] in "123"
