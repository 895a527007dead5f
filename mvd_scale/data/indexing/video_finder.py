"""Finding of the file that a line of a list means: lists come from one machine, and videos lie otherwise on another.

A path is tried below the root, below the root's folder of its class, and below the working folder; then in the same
folders with another suffix of a video; and at last anywhere below the root, where no other file can be meant.

Lines and rows of a long list lie on disk. The names in the folders that lines mean stay in memory, and the paths of all
videos below the root if a line is searched there: one look into a folder stands for one look-up per line.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import NamedTuple

from mvd_scale.data.filesystem import find_files, is_dir, is_media, join, relative
from mvd_scale.data.manifest import Row
from mvd_scale.data.spool import Mapped, Stored, store, store_sorted
from mvd_scale.data.storage import absolute, is_url
from mvd_scale.errors import UserError

NOT_A_VIDEO = "a folder, not a video: make one video of a folder of frames"

log = logging.getLogger("mvd_scale")


@dataclass(frozen=True)
class _Folder:
    """A folder that lines of a list may mean."""

    path: str
    """Absolute path."""

    name: str
    """Path relative to the root with a slash at its end; empty for the root itself."""

    entries: dict[str, bool]
    """Names of what it holds, each with whether it is a folder."""


class Line(NamedTuple):
    """A line of a list."""

    file: str
    """The list, for messages."""

    number: int
    """Number of the line, from 1, for messages."""

    written: str
    """Path of the video as the list has it."""

    label: int
    """Class of the video, from 0; -1 without one."""

    folder: str = ""
    """Name of the class, after which a folder may be named."""


class _Found(NamedTuple):
    """A line and the file that it means."""

    line: Line
    name: str
    path: str
    left_out: str | None = None

    missing: bool = False
    """Whether there is no such file."""

    moved: bool = False
    """Whether it is elsewhere than the list says."""


class _Meaning(NamedTuple):
    """A file and a line that means it."""

    path: str
    place: str
    """Number of the line among all, in digits that sort like it."""
    moved: bool
    file: str
    number: int
    written: str
    label: int


class VideoFinder:
    """Finds the videos of one list.

    Args:
        file: the list, for messages.
        root: folder or URL to which the paths of the list are relative.
        anywhere: also search paths with folders anywhere below the root, by their last parts; bare names always are.
            At a URL, nothing is looked up without it.
        folders: names of classes and folders by which the list tells videos of one name apart.

    Raises:
        UserError: `anywhere`, and the root is no folder.
    """

    def __init__(self, file: str, root: str, *, anywhere: bool, folders: Iterable[str] = ()) -> None:
        if anywhere and not is_dir(root):
            raise UserError(f"data.root {root} is not a folder: expected the folder that holds the videos of the list")
        self.file = file
        self.root = absolute(root)
        self.anywhere = anywhere
        self._known = {_spelling(folder) for folder in folders if folder}
        self._entries: dict[str, dict[str, bool]] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}
        self._places: dict[tuple[str, str], list[_Folder]] = {}
        self._below: dict[str, list[str]] | None = None
        self._by_folders = False

    def rows(self, lines: Iterable[Line]) -> Stored[Row]:
        """Rows of the videos that lines mean; one that is not found gets the path `root/written`.

        The log says how many were found elsewhere than the list says, and how many lines repeat others.

        Raises:
            UserError: a line can mean several files, or a file that a line of another class means too.
        """
        found = store(map(self._find, lines), list, lambda values: _Found(Line(*values[0]), *values[1:]))
        self._check_repeated(found)
        return Mapped(_row, found)

    def _find(self, line: Line) -> _Found:
        written = line.written
        if is_url(written) or (is_url(self.root) and not self.anywhere):
            return self._named(line, join(self.root, written))
        start, slash, name = written.rpartition("/")
        for place in self._candidates(start or slash, line.folder):
            if name in place.entries:
                left_out = NOT_A_VIDEO if place.entries[name] else None
                return _Found(line, place.name + name, f"{place.path}/{name}", left_out)
        found = self._search(line)
        if found is None:
            return self._named(line, join(self.root, written))._replace(missing=True)
        return self._named(line, found)._replace(moved=True)

    def _check_repeated(self, found: Stored[_Found]) -> None:
        """Check that no file has several classes, and log how many were found elsewhere, and how many lines repeat."""
        count = repeated = 0
        clash: list[tuple[_Meaning, _Meaning]] = []
        moved: list[_Meaning] = []
        for meanings in _by_path(found):
            first, *others = meanings
            repeated += sum(other.label == first.label for other in others)
            clash += [(other, first) for other in others if other.label != first.label]
            clash = sorted(clash, key=lambda pair: pair[0].place)[:1]
            elsewhere = [meaning for meaning in meanings if meaning.moved]
            count += bool(elsewhere)
            moved = sorted([*moved, *elsewhere], key=attrgetter("place"))[:1]
        for other, first in clash:
            raise UserError(
                f"{other.file}:{other.number}: {other.written!r} is found as {other.path}, which line {first.number} "
                f"has with another class, as {first.written!r}: write paths that tell the two videos apart, relative "
                "to the root; for one video, keep one of the lines"
            )
        for meaning in moved:
            text = "%d videos of %s are not where it says and were found by their names, such as %s in %s"
            log.info(text, count, self.file, meaning.written, meaning.path)
        if repeated:
            log.info("%d lines of %s repeat earlier ones; each counts as a video", repeated, self.file)

    def _named(self, line: Line, path: str) -> _Found:
        return _Found(line, self._relative(absolute(path)), absolute(path))

    def _relative(self, path: str) -> str:
        start = self.root.rstrip("/") + "/"
        return path[len(start) :] if path.startswith(start) else relative(path, self.root)

    def _candidates(self, start: str, folder: str) -> list[_Folder]:
        """Folders in which the video of a class may lie whose path in the list begins with `start`; none at a URL."""
        if is_url(self.root):
            return []
        key = (start, folder)
        if key not in self._places:
            below = [self.root, *(f"{self.root}/{name}" for name in dict.fromkeys((folder, _spelling(folder))) if name)]
            # A path that begins with a slash stays what it is, whatever it is joined to.
            starts = dict.fromkeys((start, *(unicodedata.normalize(form, start) for form in ("NFC", "NFD"))))
            paths = [absolute(join(place, start)) for place in (*below, ".") for start in starts]
            self._places[key] = [self._folder(path) for path in dict.fromkeys(paths)]
        return self._places[key]

    def _folder(self, path: str) -> _Folder:
        name = relative(path, self.root)
        return _Folder(path, "" if name == "." else f"{name}/", self._list(path))

    def _list(self, path: str) -> dict[str, bool]:
        if path not in self._entries:
            try:
                with os.scandir(path) as entries:
                    self._entries[path] = {entry.name: entry.is_dir() for entry in entries}
            except OSError:
                self._entries[path] = {}
        return self._entries[path]

    def _search(self, line: Line) -> str | None:
        """Path of a video that is not exactly where the list says; None if there is none."""
        written = line.written.replace("\\", "/")
        start, name = posixpath.split(written)
        for place in self._candidates(start, line.folder):
            if place.entries.get(name) is False:
                return f"{place.path}/{name}"
            found = self._same_stem(place, name)
            if found:
                return _only(found, line, written)
        if start and not self.anywhere:
            return None
        found = self._by_name(written, line.folder)
        return _only(found, line, written) if found else None

    def _same_stem(self, place: _Folder, name: str) -> list[str]:
        """Videos in a folder whose names differ from one in nothing but the suffix."""
        if place.path not in self._stems:
            files = (f"{place.path}/{entry}" for entry, is_folder in place.entries.items() if not is_folder)
            self._stems[place.path] = _by_stem(files)
        return self._stems[place.path].get(_stem(name), [])

    def _by_name(self, written: str, folder: str) -> list[str]:
        """Videos anywhere below the root that a path can mean, those that share most of it."""
        found = self._all_below().get(_stem(posixpath.basename(written)), [])
        parents = [_spelling(part) for part in posixpath.dirname(written).split("/") if part not in ("", ".", "..")]
        if parents:
            shared = {path: _shared(self._parents(path), parents) for path in found}
            most = max(shared.values(), default=0)
            found = [path for path in found if shared[path] == most and (most or self._is_flat(path, parents[-1]))]
        elif folder:
            own = [path for path in found if _spelling(folder) in self._parents(path)]
            found = own or [path for path in found if self._known.isdisjoint(self._parents(path))]
        named = [path for path in found if posixpath.basename(path) == posixpath.basename(written)]
        return named or found

    def _all_below(self) -> dict[str, list[str]]:
        """All videos below the root, by stem."""
        if self._below is None:
            self._below = _by_stem(find_files(self.root, is_media))
            parents = {posixpath.dirname(path) for paths in self._below.values() for path in paths}
            self._by_folders = any(not self._known.isdisjoint(self._parents(f"{parent}/")) for parent in parents)
        return self._below

    def _is_flat(self, path: str, parent: str) -> bool:
        """Whether a file lies in no folder of a class, so that the list can have it in the folder `parent`."""
        here = _spelling(posixpath.basename(self.root))
        return not (self._parents(path) and self._by_folders) and (here == parent or here not in self._known)

    def _parents(self, path: str) -> list[str]:
        return [_spelling(part) for part in self._relative(path).split("/")[:-1]]


def _row(found: _Found) -> Row:
    return Row(name=found.name, path=found.path, label=found.line.label, left_out=found.left_out)


def _by_path(found: Stored[_Found]) -> Iterator[list[_Meaning]]:
    """Yield the lines that mean one file, in their order, for each file that is not missing."""
    meanings = (
        json.dumps(_Meaning(one.path, f"{place:012d}", one.moved, *one.line[:4]))
        for place, one in enumerate(found)
        if not one.missing
    )
    for _, group in groupby(map(json.loads, store_sorted(meanings)), itemgetter(0)):
        yield [_Meaning(*values) for values in group]


def _only(found: Sequence[str], line: Line, written: str) -> str:
    if len(found) > 1:
        rest = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise UserError(
            f"{line.file}:{line.number}: {written!r} can be any of {len(found)} files, {', '.join(found[:4])}{rest}: "
            "write the path of one of them, relative to the root"
        )
    return found[0]


def _shared(here: Sequence[str], there: Sequence[str]) -> int:
    """Number of folders at the ends of two paths that are the same."""
    pairs = zip(reversed(here), reversed(there), strict=False)
    return next((count for count, (one, other) in enumerate(pairs) if one != other), min(len(here), len(there)))


def _by_stem(paths: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in _media(paths):
        found.setdefault(_stem(posixpath.basename(path)), []).append(path)
    return found


def _media(paths: Iterable[str]) -> Iterator[str]:
    return (path for path in paths if is_media(path) and not posixpath.basename(path).startswith("."))


def _stem(name: str) -> str:
    """Name without the suffix of a video, in one of the two ways in which file systems write accents."""
    stem = posixpath.splitext(name)[0] if is_media(name) else name
    return stem if stem.isascii() else unicodedata.normalize("NFC", stem)


def _spelling(folder: str) -> str:
    """The name of a class as folders are named after it: some installations have underscores for spaces."""
    return folder.replace(" ", "_")
