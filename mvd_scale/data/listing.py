"""Which videos a source names, before anything is known of them.

folder, glob, single file -> every video and still image in it; labels from class folders
text, csv, json           -> lists of this field, see `lists.py`
tar                       -> its members
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from typing import BinaryIO, cast

import fsspec

from mvd_scale.data.manifest import Row
from mvd_scale.data.storage import absolute, filesystem_of, is_url
from mvd_scale.errors import UserError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".json", ".list"})

FORMS = (
    "a folder, a glob, a video, a list (`path label` lines; a csv with a header; the lists of Kinetics, "
    "Something-Something, UCF101 and HMDB51), a tar file, or an fsspec URL of one of these"
)


@dataclass(frozen=True)
class Listing:
    """Rows of which name, place and label are known."""

    rows: list[Row]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListOptions:
    """What lists do not say themselves."""

    root: str | None = None
    """Folder or URL that their paths start from; the folder of the list if None."""

    classes: str | None = None
    """File with the class names (`classInd.txt`, `labels.json`); looked for beside the list if None."""

    split: str | None = None
    """Which part of a list that holds several: train, validation or test."""

    fold: int = 1
    """Which of the three official divisions of HMDB51."""


def list_videos(sources: Sequence[str], options: ListOptions) -> Listing:
    """All videos of some sources, one after the other.

    Raises:
        UserError: a source does not exist, holds no videos, or is of no known form; or labels of several sources do
            not go together.
    """
    listings = [_list_one(source, options) for source in sources]
    if len(listings) == 1:
        return listings[0]
    named = [bool(listing.classes) for listing in listings]
    if all(named):
        return unite(listings)
    if any(named) and any(row.label >= 0 for listing in listings if not listing.classes for row in listing.rows):
        raise UserError(
            f"{sources[named.index(True)]} names its classes and {sources[named.index(False)]} numbers them: their "
            "labels cannot go into one manifest. Index them one by one"
        )
    if any(named):
        return unite(listings)
    return Listing([row for listing in listings for row in listing.rows])


def unite(listings: Sequence[Listing]) -> Listing:
    """One listing whose classes are all those of some others, by name; labels are numbered anew."""
    classes = tuple(dict.fromkeys(name for listing in listings for name in listing.classes))
    number = {name: label for label, name in enumerate(classes)}
    rows = [
        replace(row, label=number[listing.classes[row.label]]) if row.label >= 0 else row
        for listing in listings
        for row in listing.rows
    ]
    return Listing(rows, classes)


def _list_one(source: str, options: ListOptions) -> Listing:
    from mvd_scale.data.lists import list_folds, read_list

    suffix = posixpath.splitext(source)[1].lower()
    if is_folder(source):
        folds = find_files(source, _is_fold)
        return list_folds(folds, source, options) if folds else _list_folder(source)
    if has_magic(source) and not exists(source):
        paths = sorted(_glob(source))
        if not paths:
            raise UserError(f"nothing matches {source}: expected a pattern such as 'videos/*/*.mp4', in quotes")
        if all(_is_fold(path) for path in paths):
            return list_folds(paths, posixpath.dirname(source), options)
        return list_videos(paths, options)
    if not exists(source):
        raise UserError(f"data.source {source} does not exist: expected a manifest (.parquet), or {FORMS}")
    if suffix == ".tar":
        return _list_tar(source)
    if suffix in LIST_SUFFIXES:
        if _is_fold(source):
            return list_folds([source], posixpath.dirname(source), options)
        return read_list(source, options)
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return Listing([Row(name=posixpath.basename(source), path=absolute(source))])
    raise UserError(f"{source} is nothing that can be indexed: expected {FORMS}")


def _list_folder(folder: str) -> Listing:
    """Videos below a folder by name; where every one lies in a folder of its own class, with labels."""
    paths = find_files(folder, _is_video)
    if not paths:
        raise UserError(
            f"no videos in the folder {folder}: expected files with one of the suffixes "
            f"{' '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))} in it or below. Give the folder that holds the videos"
        )
    names = [relative(path, folder) for path in paths]
    rows = [_named(Row(name=name, path=absolute(path))) for name, path in zip(names, paths, strict=True)]
    names = [row.name for row in rows]
    if not all("/" in name for name in names):
        return Listing(rows)
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: label for label, name in enumerate(classes)}
    return Listing([replace(row, label=number[row.name.split("/")[0]]) for row in rows], tuple(classes))


def _list_tar(path: str) -> Listing:
    """Members that are videos, with the label of a `.cls` member of the same stem (WebDataset)."""
    rows, labels = [], {}
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                stem, suffix = posixpath.splitext(member.name)
                if member.isreg() and not member.issparse():
                    if _is_video(member.name):
                        rows.append(
                            Row(name=member.name, path=absolute(path), offset=member.offset_data, size=member.size)
                        )
                    elif suffix == ".cls":
                        content = archive.extractfile(member)
                        assert content is not None
                        labels[stem] = content.read(64).decode(errors="replace").strip()
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as a tar file: {error}. Expected an uncompressed one: videos are read from it by "
            "their place in it"
        ) from error
    if not rows:
        raise UserError(f"no videos in {path}: expected members with the suffixes of videos or images")
    for stem, label in labels.items():
        if not label.isdecimal():
            raise UserError(f"{path}: {stem}.cls holds {label!r}: expected the number of the class")
    stems = [posixpath.splitext(row.name)[0] for row in rows]
    return Listing([replace(row, label=int(labels.get(stem, -1))) for row, stem in zip(rows, stems, strict=True)])


def is_folder(path: str) -> bool:
    """Whether a path or URL is a folder."""
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return bool(filesystem.isdir(inner))
    return os.path.isdir(path)


def exists(path: str) -> bool:
    """Whether there is anything at a path or URL."""
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return bool(filesystem.exists(inner))
    return os.path.exists(path)


def open_file(path: str) -> BinaryIO:
    """A file or URL, to be read in bytes."""
    return cast(BinaryIO, fsspec.open(path, "rb").open() if is_url(path) else open(path, "rb"))


def find_files(folder: str, wanted: Callable[[str], bool]) -> list[str]:
    """Paths below a folder or URL for which `wanted(path)` holds, sorted; links are followed, each folder once."""
    if is_url(folder):
        filesystem, inner = filesystem_of(folder)
        return sorted(filesystem.unstrip_protocol(path) for path in filesystem.find(inner) if wanted(path))
    seen = {os.path.realpath(folder)}
    found: list[str] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _again(os.path.join(parent, name), seen))
        found += [os.path.join(parent, name) for name in names if wanted(name)]
    return sorted(found)


def relative(path: str, folder: str) -> str:
    """A path as seen from a folder, with forward slashes; the path itself if it lies elsewhere."""
    if is_url(path):
        if path.startswith(folder.rstrip("/") + "/"):
            return path.removeprefix(folder.rstrip("/") + "/")
        if path.split("://")[0] != folder.split("://")[0]:
            return path
        return str(filesystem_of(path)[1]).removeprefix(str(filesystem_of(folder)[1]).rstrip("/") + "/")
    seen = os.path.relpath(path, folder)
    return absolute(path) if seen.startswith("..") else seen.replace(os.sep, "/")


def join(root: str, path: str) -> str:
    """A path of a list, which starts from its root unless it is absolute or a URL."""
    if is_url(path):
        return path
    return f"{root.rstrip('/')}/{path}" if is_url(root) else os.path.join(root, path)


def _named(row: Row) -> Row:
    """A row that a manifest can hold: file names may be any bytes, texts in Parquet may not."""
    try:
        f"{row.name}{row.path}".encode()
    except UnicodeEncodeError:
        readable = [text.encode(errors="replace").decode() for text in (row.name, row.path)]
        return replace(row, name=readable[0], path=readable[1], left_out="its name is not UTF-8: rename it")
    return row


def _again(folder: str, seen: set[str]) -> bool:
    real = os.path.realpath(folder)
    known = real in seen
    seen.add(real)
    return known


def _glob(pattern: str) -> Iterable[str]:
    if is_url(pattern):
        filesystem, inner = filesystem_of(pattern)
        return [filesystem.unstrip_protocol(path) for path in filesystem.glob(inner)]
    return glob(pattern, recursive=True)


def _is_video(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES


def _is_fold(path: str) -> bool:
    """A file of HMDB51's official divisions."""
    stem, suffix = posixpath.splitext(posixpath.basename(path))
    return suffix == ".txt" and stem[:-1].endswith("_test_split") and stem[-1] in "123"
