"""Lists of videos: plain lists, and the official lists of the data sets that the paper uses.

| list                                | path of a video                   | class of a video                 |
|-------------------------------------|-----------------------------------|----------------------------------|
| `path label` lines, no header       | as written, up to the last space  | an integer, -1 for no class      |
| csv with a header                   | column path, video, file, filename | column label or class, if any   |
| Kinetics (label, youtube_id, ...)   | id_start_end, in any folder       | names, numbered alphabetically   |
| Something-Something (json)          | id, in any folder                 | template, numbered by labels.json |
| UCF101 (trainlist01, testlist01)    | as written, or in any folder      | folder, numbered by classInd.txt |
| HMDB51 (class_test_split1)          | as written, in any folder         | names, numbered alphabetically   |
"""

from __future__ import annotations

import csv
import json
import posixpath
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mvd_scale.data.filesystem import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    exists,
    find_files,
    is_dir,
    join,
    open_file,
    relative,
)
from mvd_scale.data.indexing.listing import Listing, ListOptions
from mvd_scale.data.manifest import Row
from mvd_scale.data.storage import absolute
from mvd_scale.errors import UserError

_PATH_COLUMNS = ("path", "video", "file", "filename")
_LABEL_COLUMNS = ("label", "class")
_HMDB_MARKS = {"train": "1", "test": "2", None: "12"}
_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def read_list(file: str, options: ListOptions) -> Listing:
    """Videos of one list, whose format is recognised by its content.

    Raises:
        UserError: the list is empty, is not a text file, is of no known format, or has a malformed line.
    """
    if posixpath.splitext(file)[1].lower() == ".json":
        return _something(file, options)
    lines = _lines(file)
    if not lines:
        raise UserError(f"the list {file} is empty: expected one `path label` per line, or a CSV file with a header")
    header = [name.strip().lower() for name in lines[0][1].split(",")]
    if {"youtube_id", "time_start", "time_end"} <= set(header):
        return _kinetics(file, header, lines[1:], options)
    if len(set(header) & set(_PATH_COLUMNS)) == 1:
        return _table(file, header, lines[1:], options)
    if re.fullmatch(r"(train|test)list0[123]\.txt", posixpath.basename(file)):
        return _ucf(file, lines, options)
    return _plain(file, lines, options)


def list_folds(files: Sequence[str], folder: str, options: ListOptions) -> Listing:
    """Videos of HMDB51's lists: one file per class and fold, of `video.avi mark` lines.

    Mark 1 is for training, mark 2 for the test, and mark 0 for neither.

    Raises:
        UserError: HMDB51 has no such split or fold, the files of the fold are missing, or a line is malformed.
    """
    if options.split == "validation":
        raise UserError("HMDB51 has no validation split: give --split train or test, or omit --split for both")
    if options.fold not in (1, 2, 3):
        raise UserError(f"HMDB51 has the folds 1, 2 and 3, not {options.fold}: give one of these with --fold")
    ending = f"_test_split{options.fold}.txt"
    chosen = sorted(file for file in files if file.endswith(ending))
    if not chosen:
        raise UserError(f"{folder} holds no files *{ending}: expected one such file for every class")
    names = [posixpath.basename(file).removesuffix(ending) for file in chosen]
    found = _VideoFinder(options.root or folder)
    rows = []
    for label, file in enumerate(chosen):
        for number, line in _lines(file):
            video, _, mark = line.rpartition(" ")
            if mark not in ("0", "1", "2") or not video:
                raise UserError(f"{file}:{number}: {line!r} is malformed: expected `video.avi MARK`, MARK 0, 1 or 2")
            if mark in _HMDB_MARKS[options.split]:
                rows.append(found.row(video.strip(), label, f"{names[label]}/{video.strip()}"))
    return Listing(rows, tuple(names))


def _plain(file: str, lines: list[tuple[int, str]], options: ListOptions) -> Listing:
    root = options.root or _folder_of(file)
    rows = []
    for number, line in lines:
        path, _, label = line.rpartition(" ")
        if not path or not label.removeprefix("-").isdecimal():
            raise UserError(
                f"{file}:{number}: no label in {line!r}: expected `path label`, where the label is an integer after "
                "the last space. Write -1 for a video without a class"
            )
        rows.append(_row(root, path.strip(), max(int(label), -1)))
    return Listing(rows, _named_classes(options.classes))


def _table(file: str, header: list[str], lines: list[tuple[int, str]], options: ListOptions) -> Listing:
    root = options.root or _folder_of(file)
    path_column = next(name for name in _PATH_COLUMNS if name in header)
    label_column = next((name for name in _LABEL_COLUMNS if name in header), None)
    entries = _parse(file, header, lines)
    paths = [entry[path_column].strip() for entry in entries]
    labels = [entry[label_column].strip() for entry in entries] if label_column else [""] * len(entries)
    if all(re.fullmatch(r"-?\d+|", label) for label in labels):
        numbers = [max(int(label or -1), -1) for label in labels]
        classes = _named_classes(options.classes)
    else:
        classes = _named_classes(options.classes) or tuple(sorted(set(labels) - {""}))
        numbers = [_number(file, label, classes) if label else -1 for label in labels]
    return Listing([_row(root, path, label) for path, label in zip(paths, numbers, strict=True)], classes)


def _kinetics(file: str, header: list[str], lines: list[tuple[int, str]], options: ListOptions) -> Listing:
    entries = _parse(file, header, lines)
    if options.split and "split" in header:
        wanted = _SPLITS[options.split]
        entries = [entry for entry in entries if entry["split"].startswith(wanted)]
        if not entries:
            raise UserError(
                f"{file} lists no videos of the split {options.split}: give --split one of the values of its column "
                "`split`"
            )
    named = [entry["label"].strip() for entry in entries] if "label" in header else [""] * len(entries)
    classes = _named_classes(options.classes) or tuple(sorted(set(named) - {""}))
    found = _VideoFinder(options.root or _folder_of(file))
    rows = []
    for entry, name in zip(entries, named, strict=True):
        stem = f"{entry['youtube_id']}_{int(entry['time_start']):06d}_{int(entry['time_end']):06d}"
        rows.append(found.row(f"{stem}.mp4", _number(file, name, classes) if name else -1))
    return Listing(rows, classes)


def _something(file: str, options: ListOptions) -> Listing:
    try:
        entries = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise UserError(
            f"{file} is not a list of Something-Something: expected [{{'id': ..., 'template': ...}}, ...]. Give the "
            "file of the class names (labels.json) with --classes"
        )
    classes = _named_classes(options.classes or _beside(file, "labels.json", "something-something-v2-labels.json"))
    templates = [re.sub(r"[\[\]]", "", entry.get("template", "")) for entry in entries]
    if any(templates) and not classes:
        classes = tuple(sorted(set(templates) - {""}))
    found = _VideoFinder(options.root or _folder_of(file))
    return Listing(
        [
            found.row(f"{entry['id']}.webm", _number(file, template, classes) if template else -1)
            for entry, template in zip(entries, templates, strict=True)
        ],
        classes,
    )


def _ucf(file: str, lines: list[tuple[int, str]], options: ListOptions) -> Listing:
    classes = _named_classes(options.classes or _beside(file, "classInd.txt"))
    videos = [line.split()[0] for _, line in lines]
    folders = [posixpath.dirname(video) for video in videos]
    classes = classes or tuple(sorted(set(folders)))
    found = _VideoFinder(options.root or _folder_of(file))
    return Listing(
        [
            found.row(video, _number(file, folder, classes), video)
            for video, folder in zip(videos, folders, strict=True)
        ],
        classes,
    )


class _VideoFinder:
    """Video files below a folder, by stem: official lists give file names, and folders differ between installations.

    Raises:
        UserError: the folder does not exist.
    """

    def __init__(self, root: str) -> None:
        if not is_dir(root):
            raise UserError(f"data.root {root} is not a folder: expected the folder that holds the videos of the list")
        self.root = root
        suffixes = VIDEO_SUFFIXES | IMAGE_SUFFIXES
        paths = find_files(root, lambda path: posixpath.splitext(path)[1].lower() in suffixes)
        self.by_stem = {posixpath.splitext(posixpath.basename(path))[0]: path for path in paths}

    def row(self, video: str, label: int, name: str | None = None) -> Row:
        """Row of a video, found by its stem anywhere below the root; a missing one gets the path `root/video`."""
        stem = posixpath.splitext(posixpath.basename(video))[0]
        path = self.by_stem.get(stem, join(self.root, video))
        return Row(name=name or relative(path, self.root), path=absolute(path), label=label)


def _row(root: str, path: str, label: int) -> Row:
    whole = absolute(join(root, path))
    return Row(name=relative(whole, absolute(root)), path=whole, label=label)


def _named_classes(file: str | None) -> tuple[str, ...]:
    """Read class names in the order of their labels; none if `file` is None.

    Formats: a JSON object {name: number from 0}, lines `number name` with numbers from 1, or one name per line.

    Raises:
        UserError: the file is malformed, or its numbers have gaps or repeat.
    """
    if file is None:
        return ()
    text = _text(file)
    if posixpath.splitext(file)[1].lower() == ".json":
        numbers: Any = json.loads(text)
        if not isinstance(numbers, dict):
            raise UserError(f"{file}: expected a JSON object of class names and numbers, {{name: number}}")
        pairs = sorted((int(number), name) for name, number in numbers.items())
    else:
        split = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
        if all(number.isdecimal() for number, _, _ in split):
            pairs = sorted((int(number) - 1, name.strip()) for number, _, name in split)
        else:
            pairs = [(number, line.strip()) for number, line in enumerate(filter(str.strip, text.splitlines()))]
    if [number for number, _ in pairs] != list(range(len(pairs))):
        raise UserError(f"{file}: the class numbers have gaps or repeat: expected consecutive numbers, each once")
    return tuple(name for _, name in pairs)


def _number(file: str, name: str, classes: tuple[str, ...]) -> int:
    try:
        return _numbers(classes)[name]
    except KeyError as error:
        raise UserError(
            f"{file}: the class {name!r} is not one of the {len(classes)} known classes "
            f"({', '.join(classes[:3])} ...): give the class file that belongs to this list with --classes"
        ) from error


@lru_cache(maxsize=1)
def _numbers(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def _folder_of(file: str) -> str:
    return posixpath.dirname(file) or "."


def _beside(file: str, *names: str) -> str | None:
    candidates = [join(_folder_of(file), name) for name in names]
    return next((path for path in candidates if exists(path)), None)


def _parse(file: str, header: list[str], lines: list[tuple[int, str]]) -> list[dict[str, str]]:
    entries = []
    for (number, _), values in zip(lines, csv.reader([line for _, line in lines]), strict=True):
        if len(values) != len(header):
            raise UserError(f"{file}:{number}: {len(values)} fields, expected {len(header)} as in the header")
        entries.append(dict(zip(header, values, strict=True)))
    return entries


def _lines(file: str) -> list[tuple[int, str]]:
    """Lines that are not empty, each with its number from 1."""
    numbered = enumerate(_text(file).splitlines(), start=1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def _text(file: str) -> str:
    with open_file(file) as opened:
        try:
            return opened.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not a text file: expected a list of videos, or a folder of videos") from error
