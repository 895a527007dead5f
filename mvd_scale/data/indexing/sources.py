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
from collections.abc import Sequence
from dataclasses import replace
from glob import glob, has_magic

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
from mvd_scale.data.indexing.listing import Listing, ListOptions, merge_listings
from mvd_scale.data.manifest import Row
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
    listings = [_list_one(source, options) for source in sources]
    if len(listings) == 1:
        return listings[0]
    named = [bool(listing.classes) for listing in listings]
    if all(named):
        return merge_listings(listings)
    if any(named) and any(row.label >= 0 for listing in listings if not listing.classes for row in listing.rows):
        raise UserError(
            f"{sources[named.index(True)]} has class names, but {sources[named.index(False)]} has class numbers only: "
            "their labels cannot be combined in one manifest. Index each source into a manifest of its own"
        )
    if any(named):
        return merge_listings(listings)
    return Listing([row for listing in listings for row in listing.rows])


def _list_one(source: str, options: ListOptions) -> Listing:
    from mvd_scale.data.indexing.dataset_lists import list_folds, read_list
    from mvd_scale.data.indexing.tars import list_tar

    suffix = posixpath.splitext(source)[1].lower()
    if is_dir(source):
        folds = find_files(source, _is_fold)
        return list_folds(folds, source, options) if folds else _list_folder(source)
    if has_magic(source) and not exists(source):
        paths = _glob(source)
        if not paths:
            raise UserError(f"no file matches {source}: expected a pattern such as 'videos/*/*.mp4', in quotes")
        if all(_is_fold(path) for path in paths):
            return list_folds(paths, posixpath.dirname(source), options)
        if all(is_media(path) and not is_dir(path) for path in paths):
            return _list_paths(paths, _fixed_part(source))
        return list_videos(paths, options)
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
    paths = [path for path in files if is_media(path)]
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
    return _list_paths(paths, folder)


def _list_paths(paths: Sequence[str], folder: str) -> Listing:
    names = [relative(path, folder) for path in paths]
    rows = [_with_valid_name(Row(name=name, path=absolute(path))) for name, path in zip(names, paths, strict=True)]
    names = [row.name for row in rows]
    if not all("/" in name for name in names):
        return Listing(rows)
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: label for label, name in enumerate(classes)}
    return Listing([replace(row, label=number[row.name.split("/")[0]]) for row in rows], tuple(classes))


def _with_valid_name(row: Row) -> Row:
    """Row that Parquet can store: a file name that is not UTF-8 is replaced by a readable one, and left out."""
    try:
        f"{row.name}{row.path}".encode()
    except UnicodeEncodeError:
        readable = [text.encode(errors="replace").decode() for text in (row.name, row.path)]
        return replace(row, name=readable[0], path=readable[1], left_out="its name is not valid UTF-8: rename the file")
    return row


def _glob(pattern: str) -> list[str]:
    """Paths that match a pattern, sorted; those that are nothing only if the pattern has their names."""
    if is_url(pattern):
        filesystem, inner = filesystem_of(pattern)
        paths = [str(filesystem.unstrip_protocol(path)) for path in filesystem.glob(inner)]
        return sorted(path for path in paths if not is_nothing(relative(path, _fixed_part(pattern))))
    start = _fixed_part(pattern)
    wished = "/." in pattern.removeprefix(start)
    found = (path for path in glob(pattern, recursive=True) if wished or not is_nothing(path.removeprefix(start)))
    if "**" not in pattern:
        return sorted(found)
    # A link to a parent folder leads to the same folder by many paths: the shortest one is meant.
    folders: dict[str, list[str]] = {}
    for path in found:
        folders.setdefault(posixpath.dirname(path), []).append(path)
    real: dict[str, str] = {}
    for folder in sorted(folders, key=lambda name: (name.count("/"), name)):
        real.setdefault(os.path.realpath(folder), folder)
    return sorted(path for folder in real.values() for path in folders[folder])


def _fixed_part(pattern: str) -> str:
    """The folders at the beginning of a glob that have no magic; the current folder if there are none."""
    found = re.search(r"[*?\[]", pattern)
    assert found is not None
    return posixpath.dirname(pattern[: found.start()]) or "."


def _is_fold(path: str) -> bool:
    """Whether a path is a file of HMDB51's official splits, such as `brush_hair_test_split1.txt`."""
    stem, suffix = posixpath.splitext(posixpath.basename(path))
    return suffix == ".txt" and stem[:-1].endswith("_test_split") and stem[-1] in "123"
