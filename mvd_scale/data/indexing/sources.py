"""Listing of the videos of a source: names, paths and labels, before any file is opened.

folder, glob, single file -> every video and still image in it; labels from class folders
text, csv, json           -> lists in the formats of public data sets, see `lists.py`
tar                       -> members that are videos or still images
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from glob import glob, has_magic

from mvd_scale.data.filesystem import IMAGE_SUFFIXES, VIDEO_SUFFIXES, exists, find_files, is_dir, open_file, relative
from mvd_scale.data.indexing.listing import Listing, ListOptions, merge_listings
from mvd_scale.data.manifest import Row
from mvd_scale.data.storage import absolute, filesystem_of, is_url
from mvd_scale.errors import UserError

LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".json", ".list"})

SOURCE_FORMS = (
    "a folder, a glob, a video, a list (`path label` lines; a csv with a header; the lists of Kinetics, "
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

    suffix = posixpath.splitext(source)[1].lower()
    if is_dir(source):
        folds = find_files(source, _is_fold)
        return list_folds(folds, source, options) if folds else _list_folder(source)
    if has_magic(source) and not exists(source):
        paths = sorted(_glob(source))
        if not paths:
            raise UserError(f"no file matches {source}: expected a pattern such as 'videos/*/*.mp4', in quotes")
        if all(_is_fold(path) for path in paths):
            return list_folds(paths, posixpath.dirname(source), options)
        return list_videos(paths, options)
    if not exists(source):
        raise UserError(f"data.source {source} does not exist: expected a manifest (.parquet), or {SOURCE_FORMS}")
    if suffix == ".tar":
        return _list_tar(source)
    if suffix in LIST_SUFFIXES:
        if _is_fold(source):
            return list_folds([source], posixpath.dirname(source), options)
        return read_list(source, options)
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return Listing([Row(name=posixpath.basename(source), path=absolute(source))])
    raise UserError(f"{source} cannot be indexed: expected {SOURCE_FORMS}")


def _list_folder(folder: str) -> Listing:
    """Videos below a folder, sorted by name; with labels if every video lies in a sub-folder, which names its class."""
    paths = find_files(folder, _is_video)
    if not paths:
        raise UserError(
            f"no videos in the folder {folder}: expected files with one of the suffixes "
            f"{' '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))} in it or in its sub-folders. Give the folder that "
            "holds the videos"
        )
    names = [relative(path, folder) for path in paths]
    rows = [_with_valid_name(Row(name=name, path=absolute(path))) for name, path in zip(names, paths, strict=True)]
    names = [row.name for row in rows]
    if not all("/" in name for name in names):
        return Listing(rows)
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: label for label, name in enumerate(classes)}
    return Listing([replace(row, label=number[row.name.split("/")[0]]) for row in rows], tuple(classes))


def _list_tar(path: str) -> Listing:
    """Members of a tar file that are videos; labels from `.cls` members of the same stem (WebDataset)."""
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
            f"{path} cannot be read as a tar file: {error}. Expected an uncompressed tar file: videos are read from it "
            "by byte offset"
        ) from error
    if not rows:
        raise UserError(
            f"no videos in {path}: expected members with one of the suffixes "
            f"{' '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))}"
        )
    for stem, label in labels.items():
        if not label.isdecimal():
            raise UserError(f"{path}: {stem}.cls holds {label!r}: expected the number of a class, from 0 on")
    stems = [posixpath.splitext(row.name)[0] for row in rows]
    return Listing([replace(row, label=int(labels.get(stem, -1))) for row, stem in zip(rows, stems, strict=True)])


def _with_valid_name(row: Row) -> Row:
    """Row that Parquet can store: a file name that is not UTF-8 is replaced by a readable one, and left out."""
    try:
        f"{row.name}{row.path}".encode()
    except UnicodeEncodeError:
        readable = [text.encode(errors="replace").decode() for text in (row.name, row.path)]
        return replace(row, name=readable[0], path=readable[1], left_out="its name is not valid UTF-8: rename the file")
    return row


def _glob(pattern: str) -> Iterable[str]:
    if is_url(pattern):
        filesystem, inner = filesystem_of(pattern)
        return [filesystem.unstrip_protocol(path) for path in filesystem.glob(inner)]
    return glob(pattern, recursive=True)


def _is_video(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES


def _is_fold(path: str) -> bool:
    """Whether a path is a file of HMDB51's official splits, such as `brush_hair_test_split1.txt`."""
    stem, suffix = posixpath.splitext(posixpath.basename(path))
    return suffix == ".txt" and stem[:-1].endswith("_test_split") and stem[-1] in "123"
