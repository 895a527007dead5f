"""Finding of the file that a line of a list means: lists come from one machine, and videos lie otherwise on another.

A path is tried below the root, below the root's folder of its class, and below the working folder; then in the same
folders with another suffix of a video; and at last anywhere below the root, where no other file can be meant.
"""

from __future__ import annotations

import logging
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mvd_scale.data.filesystem import find_files, is_dir, is_media, join, relative
from mvd_scale.data.manifest import Row
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
        self._found: dict[str, str] = {}
        self._meant: dict[str, tuple[int, str, int]] = {}
        self._repeated = 0

    def row(self, line: int, written: str, label: int, folder: str = "") -> Row:
        """Row of the video that a line means; one that is not found gets the path `root/written`.

        Args:
            line: number of the line, for messages.
            written: path of the video as the list has it.
            label: its class, from 0; -1 without one.
            folder: name of its class, after which a folder may be named.

        Raises:
            UserError: the line can mean several files, or a file that a line of another class means too.
        """
        if is_url(written) or (is_url(self.root) and not self.anywhere):
            return self._once(self._named(join(self.root, written), label), line, written)
        start, slash, name = written.rpartition("/")
        for place in self._candidates(start or slash, folder):
            if name in place.entries:
                left_out = NOT_A_VIDEO if place.entries[name] else None
                row = Row(name=place.name + name, path=f"{place.path}/{name}", label=label, left_out=left_out)
                return self._once(row, line, written)
        found = self._search(line, written, folder)
        if found is None:
            return self._named(join(self.root, written), label)
        self._found.setdefault(found, written)
        return self._once(self._named(found, label), line, written)

    def log_found(self) -> None:
        """Log how many videos were found elsewhere than the list says, and how many lines repeat others."""
        if self._found:
            path, written = next(iter(self._found.items()))
            text = "%d videos of %s are not where it says and were found by their names, such as %s in %s"
            log.info(text, len(self._found), self.file, written, path)
        if self._repeated:
            log.info("%d lines of %s repeat earlier ones; each counts as a video", self._repeated, self.file)

    def _named(self, path: str, label: int) -> Row:
        return Row(name=self._relative(absolute(path)), path=absolute(path), label=label)

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

    def _search(self, line: int, written: str, folder: str) -> str | None:
        """Path of a video that is not exactly where the list says; None if there is none."""
        if "\\" in written:
            written = written.replace("\\", "/")
        start, name = posixpath.split(written)
        for place in self._candidates(start, folder):
            if place.entries.get(name) is False:
                return f"{place.path}/{name}"
            found = self._same_stem(place, name)
            if found:
                return self._only(found, line, written)
        if start and not self.anywhere:
            return None
        found = self._by_name(written, folder)
        return self._only(found, line, written) if found else None

    def _only(self, found: Sequence[str], line: int, written: str) -> str:
        if len(found) > 1:
            rest = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise UserError(
                f"{self.file}:{line}: {written!r} can be any of {len(found)} files, {', '.join(found[:4])}{rest}: "
                "write the path of one of them, relative to the root"
            )
        return found[0]

    def _once(self, row: Row, line: int, written: str) -> Row:
        """The row of a file, which no other line may have with another class."""
        first, earlier, label = self._meant.setdefault(row.path, (line, written, row.label))
        self._repeated += first != line and label == row.label
        if label != row.label:
            raise UserError(
                f"{self.file}:{line}: {written!r} is found as {row.path}, which line {first} has with another class, "
                f"as {earlier!r}: write paths that tell the two videos apart, relative to the root; for one video, "
                "keep one of the lines"
            )
        return row

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
