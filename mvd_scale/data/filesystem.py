"""Files and folders by path or fsspec URL: suffixes, tests, opening, recursive search."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO, cast

import fsspec

from mvd_scale.data.spool import Stored, store_sorted
from mvd_scale.data.storage import absolute, filesystem_of, is_url

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv"}
    | {".mpe", ".m2v", ".asf", ".f4v", ".mts", ".m2ts", ".vob", ".3g2", ".ogm", ".rm", ".rmvb", ".divx", ".mjpeg"}
    | {".gif", ".m1v", ".m2p", ".mod", ".tod", ".mxf", ".dv", ".nut", ".y4m", ".wtv", ".amv", ".ivf", ".obu", ".apng"}
    | {".h264", ".264", ".avc", ".h265", ".265", ".hevc"}
)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES

_SHOWN = 6
"""Largest number of suffixes that a message has."""

_NOTHING = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
"""Names of files and folders that systems add beside those of the user; hidden ones come on top of them."""


def is_media(path: str) -> bool:
    """Whether a path has the suffix of a video or of a still image."""
    return posixpath.splitext(path)[1].lower() in MEDIA_SUFFIXES


def is_nothing(path: str) -> bool:
    """Whether a relative path leads through something that is not the user's: hidden, or made by a system.

    Hidden are names with a dot at their beginning: among them AppleDouble's `._NAME`, which has the suffix of a video,
    and `.ipynb_checkpoints`, which holds copies.
    """
    return any(part in _NOTHING or part.startswith(".") for part in path.split("/") if part not in (".", ".."))


def is_dir(path: str) -> bool:
    """Whether a path or URL is a folder."""
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return bool(filesystem.isdir(inner))
    return os.path.isdir(path)


def exists(path: str) -> bool:
    """Whether a file or folder exists at a path or URL."""
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return bool(filesystem.exists(inner))
    return os.path.exists(path)


def open_file(path: str) -> BinaryIO:
    """Open a file or URL for reading bytes."""
    return cast(BinaryIO, fsspec.open(path, "rb").open() if is_url(path) else open(path, "rb"))


def find_files(folder: str, predicate: Callable[[str], bool]) -> Stored[str]:
    """Paths below a folder or URL for which `predicate(path)` is true, sorted; without those that are nothing.

    Symbolic links are followed; each folder is visited once, even if several links lead to it. Below a folder, no list
    of all files is held in memory. Below a URL, fsspec holds one while it lists.
    """
    if is_url(folder):
        filesystem, inner = filesystem_of(folder)
        length = len(str(inner).rstrip("/"))
        paths = (path for path in filesystem.find(inner) if not is_nothing(path[length:]))
        return store_sorted(filesystem.unstrip_protocol(path) for path in paths if predicate(path))
    return store_sorted(_walk(folder, predicate, {os.path.realpath(folder)}))


def _walk(folder: str, predicate: Callable[[str], bool], seen: set[str]) -> Iterator[str]:
    """Yield the files below a folder whose names the predicate takes, in any order; what cannot be read is passed by.

    Args:
        folder: the folder.
        predicate: function of the name of a file.
        seen: real paths of the folders that are visited, or will be by a caller.
    """
    todo = [folder]
    while todo:
        parent, folders = todo.pop(), []
        for entry in _scan(parent):
            if is_nothing(entry.name):
                continue
            if _leads_to_folder(entry):
                folders.append(entry.name)
            elif predicate(entry.name):
                yield entry.path
        # Depth first in the order of names, which decides by which of several links a folder is visited.
        new = [os.path.join(parent, name) for name in sorted(folders)]
        todo += reversed([path for path in new if not _visited(path, seen)])


def _scan(folder: str) -> Iterator[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(folder) as entries:
        yield from entries


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def count_by_kind(paths: Iterable[str]) -> str:
    """Numbers of files by suffix, the most frequent first, in words; empty if there are none."""
    counts = Counter(posixpath.splitext(path)[1].lower() or "no suffix" for path in paths).most_common()
    rest = sum(count for _, count in counts[_SHOWN:])
    shown = [f"{count} {suffix}" for suffix, count in counts[:_SHOWN]]
    return ", ".join(shown + [f"{rest} others"] * bool(rest))


def relative(path: str, folder: str) -> str:
    """Path relative to a folder, with forward slashes; the absolute path if it is not below the folder."""
    if is_url(path):
        if path.startswith(folder.rstrip("/") + "/"):
            return path.removeprefix(folder.rstrip("/") + "/")
        if path.split("://")[0] != folder.split("://")[0]:
            return path
        return str(filesystem_of(path)[1]).removeprefix(str(filesystem_of(folder)[1]).rstrip("/") + "/")
    seen = os.path.relpath(path, folder)
    return absolute(path) if seen.startswith("..") else seen.replace(os.sep, "/")


def join(root: str, path: str) -> str:
    """Path of a list entry, relative to `root` unless it is absolute or a URL."""
    if is_url(path):
        return path
    return f"{root.rstrip('/')}/{path}" if is_url(root) else os.path.join(root, path)


def _visited(folder: str, seen: set[str]) -> bool:
    real = os.path.realpath(folder)
    known = real in seen
    seen.add(real)
    return known
