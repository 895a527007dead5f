"""Lists of videos: plain lists, and the official lists of the data sets that the paper uses.

| list                                | path of a video                   | class of a video                 |
|-------------------------------------|-----------------------------------|----------------------------------|
| `path label` lines, no header       | as written, up to the last space  | a number or a name, -1 for none  |
| `path,label`, also by tab or `;`    | first field                       | last field, likewise             |
| `path 0 -1` in every line           | as written                        | none                             |
| csv with a header                   | column path, video, file ...      | column label or class, if any    |
| Kinetics (label, youtube_id, ...)   | id_start_end, in any folder       | names, numbered alphabetically   |
| Something-Something (json)          | id, in any folder                 | template, numbered by labels.json |
| UCF101 (trainlist01, testlist01)    | as written, or in any folder      | folder, numbered by classInd.txt |
| HMDB51 (class_test_split1)          | in the folder of its class        | names, numbered alphabetically   |

A long list is gone through line by line, several times, and its rows lie on disk. Memory grows with the classes and the
folders; with the names of files that `VideoFinder` looks through; and with a list in JSON, which is read whole.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mvd_scale.data.filesystem import exists, is_media, join
from mvd_scale.data.indexing.list_tables import (
    CLEAR_PATH_COLUMNS,
    KINETICS_COLUMNS,
    LABEL_COLUMNS,
    PATH_COLUMNS,
    Record,
    Table,
    label_number,
    read_table,
    read_text,
    store_records,
    whole_number,
)
from mvd_scale.data.indexing.listing import Listing, ListOptions
from mvd_scale.data.indexing.video_finder import Line, VideoFinder
from mvd_scale.data.spool import Mapped, Stored
from mvd_scale.data.storage import is_url
from mvd_scale.errors import UserError

log = logging.getLogger("mvd_scale")

_HMDB_MARKS = {"train": "1", "test": "2", None: "12"}
_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_NUMBER_LIKE = re.compile(r"[-+\d.,;|/\s\[\](){}]*\d[-+\d.,;|/\s\[\](){}]*([eE][-+]?\d+)?")
"""Text that is no name: a number in any writing, or several."""

LIST_FORMS = (
    "Lists that are read: `path label` with the label after the last space; the same by comma, tab or semicolon; a csv "
    "with a header, of which the columns path and label are taken, and others are not"
)


def read_list(file: str, options: ListOptions) -> Listing:
    """Videos of one list, whose format is recognised by its content.

    Raises:
        UserError: the list is empty, is not a text file, is of no known format, or has a malformed line; or a line can
            mean several videos.
    """
    if posixpath.splitext(file)[1].lower() == ".json":
        return _something(file, options)
    table = read_table(file)
    if set(table.header) >= KINETICS_COLUMNS:
        return _kinetics(table, options)
    if table.header:
        return _csv(table, options)
    if re.fullmatch(r"(train|test)list0[123]\.txt", posixpath.basename(file)):
        videos = Mapped(lambda record: _first(record[1]).replace("\\", "/"), table.records)
        if all("/" in video for video in videos):
            return _ucf(table, videos, options)
    return _plain(table, options)


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
    finder = VideoFinder(folder, options.root or folder, anywhere=True, folders=names)
    lines = (
        Line(file, line, f"{name}/{video}", label)
        for label, (file, name) in enumerate(zip(chosen, names, strict=True))
        for line, video in _fold(file, _HMDB_MARKS[options.split])
    )
    return Listing(finder.rows(lines), tuple(names))


def _fold(file: str, marks: str) -> Iterator[tuple[int, str]]:
    """Yield number and video of the lines of one file of HMDB51 that have one of some marks."""
    for line, fields in read_table(file).records:
        video, mark = _first(fields[:-1]), fields[-1].strip()
        if mark not in ("0", "1", "2") or not video:
            raise UserError(
                f"{file}:{line}: {' '.join(fields)!r} is malformed: expected `video.avi MARK`, MARK 0, 1 or 2"
            )
        if mark in marks:
            yield line, video


def _plain(table: Table, options: ListOptions) -> Listing:
    table = _without_bounds(table)
    _of_split(table, options)
    root = options.root or _folder_of(table.file)
    named = all(
        len(fields) == 2 and is_media(fields[0]) and _NUMBER_LIKE.fullmatch(fields[1]) is None
        for _, fields in table.records
    )

    def checked(record: Record) -> Record:
        line, fields = record
        fields = _without_empty(table, fields)
        _check_columns(table, line, fields, root)
        if not fields[0] or (not named and whole_number(fields[1]) is None):
            raise _no_label(table.file, line, table.delimiter.join(fields))
        return line, fields

    records = store_records(map(checked, table.records))
    return _listing(table.file, records, options, anywhere=options.root is not None)


def _listing(file: str, records: Stored[Record], options: ListOptions, *, anywhere: bool) -> Listing:
    """Listing of records of two fields each, path and label."""
    texts = Mapped(lambda record: (record[0], record[1][1].strip()), records)
    label_of, classes = _labels(file, texts, options.classes)
    starts, labels = set(), set()
    for line, fields in records:
        starts.add(fields[0].strip().rpartition("/")[0])
        labels.add(label_of(line, fields[1].strip()))
    if not classes and min(labels - {-1}, default=0) == 1:
        log.info("no video of %s has the label 0: if its labels count from 1, class 0 is empty", file)
    folders = {*map(posixpath.basename, starts), *classes}
    root = options.root or _folder_of(file)
    finder = VideoFinder(file, root, anywhere=anywhere and not is_url(root), folders=folders)

    def lines() -> Iterator[Line]:
        for line, fields in records:
            label = label_of(line, fields[1].strip())
            yield Line(file, line, fields[0].strip(), label, classes[label] if classes and label >= 0 else "")

    return Listing(finder.rows(lines()), classes)


def _without_empty(table: Table, fields: list[str]) -> list[str]:
    """The fields of a record without a header, without empty ones beyond two: spreadsheets delimit every empty cell."""
    empty = table.delimiter != " " and len(fields) > 2 and not "".join(fields[2:]).strip()
    return fields[:2] if empty else fields


def _check_columns(table: Table, line: int, fields: list[str], root: str) -> None:
    """Check that a record without a header has two columns.

    Raises:
        UserError: it has fewer or more; the message names the forms that are read.
    """
    if len(fields) < 2:
        raise _no_label(table.file, line, fields[0])
    by_words = table.delimiter == " " and not is_media(fields[0])
    columns = _columns_of_words(fields) if by_words else fields
    if len(columns) == 2 or (by_words and exists(join(root, fields[0]))):
        return
    where = f"{table.file}:{line}: {len(columns)} columns in {table.delimiter.join(fields)!r}"
    if (
        len(columns) in (3, 4)
        and not is_media(columns[0])
        and all(column.strip().isdecimal() for column in columns[1:])
    ):
        raise UserError(
            f"{where}: this is a list of folders of frames (`path frames label`, `path start frames label`), and only "
            "videos are read. Make a video of each folder, for example with `ffmpeg -framerate 25 -i "
            f"FOLDER/img_%05d.jpg FOLDER.mp4`, and list these. {LIST_FORMS}"
        )
    raise UserError(f"{where}, expected 2, a path and one label. {LIST_FORMS}")


def _columns_of_words(fields: list[str]) -> list[str]:
    """The columns of a line by spaces that has no video up to its last space: the first number ends the path."""
    path, columns = fields[0], fields[1:]
    while True:
        start, _, word = path.rpartition(" ")
        if not start or whole_number(word) is None:
            return [path, *columns]
        path, columns = start.strip(), [word, *columns]


def _without_bounds(table: Table) -> Table:
    """The table with the label -1 if every line is `path 0 -1`: VideoMAE V2's form for whole videos without a class."""

    def words(fields: Sequence[str]) -> list[str]:
        return [*fields[0].rsplit(None, 1), *fields[1:]] if table.delimiter == " " else [*map(str.strip, fields)]

    if not all(
        found[1:] == ["0", "-1"] and is_media(found[0]) for found in (words(record[1]) for record in table.records)
    ):
        return table
    return Table(table.file, Mapped(lambda record: (record[0], [words(record[1])[0], "-1"]), table.records))


def _no_label(file: str, line: int, text: str) -> UserError:
    return UserError(
        f"{file}:{line}: no label in {text!r}: expected `path label`, where the label is one integer after the last "
        "space or comma, or in every line a name. Write -1 for a video without a class. If this line is a header, call "
        "its columns path and label"
    )


def _labels(
    file: str, texts: Stored[tuple[int, str]], classes_file: str | None
) -> tuple[Callable[[int, str], int], tuple[str, ...]]:
    """Function from line and label to the number of a class, and class names, for the labels of a list.

    Labels are whole numbers in any writing, or names.

    Raises:
        UserError: numbers and names are mixed without a file of the names, a number is not whole or beyond the classes,
            or a name is not one of the classes.
    """
    classes = _named_classes(classes_file)
    if all(label_number(text) is not None for _, text in texts):
        for line, text in texts if classes else ():
            if _whole(text) >= len(classes):
                raise UserError(
                    f"{file}:{line}: label {_whole(text)}, but {classes_file} has {len(classes)} classes, "
                    f"0 to {len(classes) - 1}: give the file of classes that belongs to this list"
                )
        return lambda _, text: _whole(text), classes
    if classes:
        for line, text in texts:
            _label_of(file, line, text, classes)
    else:
        _check_names(file, texts)
        classes = tuple(sorted({text for _, text in texts} - {""}))
    return lambda line, text: _label_of(file, line, text, classes), classes


def _whole(text: str) -> int:
    number = label_number(text)
    assert number is not None
    return number


def _label_of(file: str, line: int, text: str, classes: tuple[str, ...]) -> int:
    return _number(file, line, text, classes) if text else -1


def _check_names(file: str, texts: Stored[tuple[int, str]]) -> None:
    """Check that labels, some of which are no classes' numbers, are names.

    Raises:
        UserError: one is a number.
    """
    for line, text in texts:
        if text and label_number(text) is None and _NUMBER_LIKE.fullmatch(text):
            raise UserError(
                f"{file}:{line}: the label {text!r} is no number of a class: expected one whole number, from 0 on"
            )
    named = next((line, text) for line, text in texts if label_number(text) is None)
    for line, text in texts:
        if text and label_number(text) is not None:
            raise UserError(
                f"{file}:{line}: the label {text!r} is a number, but {named[1]!r} in line {named[0]} is a name: write "
                "all labels as numbers, or all as names. If classes are called so, give a file of them with --classes"
            )


def _csv(table: Table, options: ListOptions) -> Listing:
    paths = [name for name in CLEAR_PATH_COLUMNS if name in table.header]
    paths = paths or [name for name in PATH_COLUMNS if name in table.header]
    if len(paths) > 1:
        raise UserError(
            f"{table.file}:1: the columns {' and '.join(paths)} can both be the path of the video: rename all but one"
        )
    labels = [name for name in LABEL_COLUMNS if name in table.header]
    twice = next((name for name in (*paths, *labels[:1]) if table.header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{table.file}:1: several columns are called {twice}: rename all but the one that counts")
    if not labels and len(table.header) > 1:
        log.warning(
            "%s has no column of labels, so that its videos get none: its columns are %s, expected one of %s",
            *(table.file, ", ".join(table.header), ", ".join(LABEL_COLUMNS)),
        )
    if len(labels) > 1:
        log.info("%s: labels are those of the column %s, not of %s", table.file, labels[0], ", ".join(labels[1:]))
    path, label = table.header.index(paths[0]), table.header.index(labels[0]) if labels else None

    def pairs() -> Iterator[Record]:
        for line, fields in _of_split(_checked(table), options):
            if not fields[path].strip():
                raise UserError(f"{table.file}:{line}: no path in the column {paths[0]}: expected the path of a video")
            text = fields[label] if label is not None else ""
            # With semicolons between fields, the decimal sign is a comma.
            text = re.sub(r"^\s*([-+]?\d+),0{1,2}\s*$", r"\1", text) if table.delimiter == ";" else text
            yield line, [fields[path], text]

    return _listing(table.file, store_records(pairs()), options, anywhere=options.root is not None)


def _checked(table: Table) -> Table:
    """The table whose records have as many fields as the header; empty ones at their ends are dropped.

    Raises:
        UserError: a record has more or fewer.
    """

    def checked(record: Record) -> Record:
        line, fields = record
        while len(fields) > len(table.header) and not fields[-1].strip():
            fields = fields[:-1]
        if len(fields) != len(table.header):
            raise UserError(
                f"{table.file}:{line}: {len(fields)} fields, expected {len(table.header)} as in the header; put a "
                "field that holds the delimiter in quotes"
            )
        return line, fields

    return replace(table, records=store_records(map(checked, table.records)))


def _kinetics(table: Table, options: ListOptions) -> Listing:
    column = {name: number for number, name in enumerate(table.header)}
    table = _checked(table)
    records = _of_split(table, options) if "split" in column else table.records
    place = column.get("label")

    def named(record: Record) -> tuple[int, str]:
        return record[0], "" if place is None else record[1][place].strip()

    label_of, classes = _labels(table.file, Mapped(named, records), options.classes)
    root = options.root or _folder_of(table.file)
    finder = VideoFinder(table.file, root, anywhere=True, folders=classes)

    def lines() -> Iterator[Line]:
        for line, fields in records:
            _, name = named((line, fields))
            start, end = (_seconds(table.file, line, fields[column[key]]) for key in ("time_start", "time_end"))
            stem = f"{fields[column['youtube_id']].strip()}_{start:06d}_{end:06d}"
            yield Line(table.file, line, f"{stem}.mp4", label_of(line, name), name)

    return Listing(finder.rows(lines()), classes)


def _of_split(table: Table, options: ListOptions) -> Stored[Record]:
    """Records that have the wanted split in the column `split`; all of them if none is wanted.

    Raises:
        UserError: there are none, or no such column.
    """
    if options.split is None:
        return table.records
    if "split" not in table.header:
        raise UserError(f"{table.file} has no column `split`: leave --split {options.split} out, or give another list")
    place, wanted = table.header.index("split"), _SPLITS[options.split]
    records = store_records(record for record in table.records if record[1][place].strip().lower().startswith(wanted))
    if not records:
        raise UserError(
            f"{table.file} lists no videos of the split {options.split}: give --split one of the values of its "
            "column `split`"
        )
    return records


def _seconds(file: str, line: int, text: str) -> int:
    number = whole_number(text)
    if number is None:
        raise UserError(f"{file}:{line}: the time {text!r} is malformed: expected whole seconds")
    return number


def _something(file: str, options: ListOptions) -> Listing:
    entries = _json(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise UserError(
            f"{file} is not a list of Something-Something: expected [{{'id': ..., 'template': ...}}, ...]. Give the "
            "file of the class names (labels.json) with --classes"
        )
    beside = _beside(file, "labels.json", "something-something-v2-labels.json")
    classes = _named_classes(options.classes or beside)
    templates = [re.sub(r"[\[\]]", "", str(entry.get("template") or "")) for entry in entries]
    if any(templates) and not classes:
        classes = tuple(sorted(set(templates) - {""}))
    finder = VideoFinder(file, options.root or _folder_of(file), anywhere=True)
    lines = (
        Line(file, number, f"{entry['id']}.webm", _label_of(file, number, template, classes))
        for number, (entry, template) in enumerate(zip(entries, templates, strict=True), start=1)
    )
    return Listing(finder.rows(lines), classes)


def _ucf(table: Table, videos: Stored[str], options: ListOptions) -> Listing:
    classes = _named_classes(options.classes or _beside(table.file, "classInd.txt"))
    folders = {_folder_of_class(video) for video in videos}
    classes = classes or tuple(sorted(folders))
    root = options.root or _folder_of(table.file)
    finder = VideoFinder(table.file, root, anywhere=True, folders={*classes, *folders})
    lines = (
        Line(table.file, line, video, _number(table.file, line, _folder_of_class(video), classes))
        for (line, _), video in zip(table.records, videos, strict=True)
    )
    return Listing(finder.rows(lines), classes)


def _folder_of_class(video: str) -> str:
    return posixpath.basename(posixpath.dirname(video))


def _first(fields: Sequence[str]) -> str:
    """Path at the beginning of a record of UCF101 or HMDB51, which may have spaces; a number ends it."""
    return " ".join(fields[:-1] if len(fields) > 1 and whole_number(fields[-1]) is not None else fields).strip()


def _named_classes(file: str | None) -> tuple[str, ...]:
    """Read class names in the order of their labels; none if `file` is None.

    Formats: a JSON object {name: number from 0}; lines `number name`, `number,name` and the like with numbers from 0 or
    1, with or without a header; or one name per line.

    Raises:
        UserError: the file is malformed, its numbers have gaps or repeat, or a name repeats.
    """
    if file is None:
        return ()
    if posixpath.splitext(file)[1].lower() == ".json":
        pairs = _classes_of_json(file)
    else:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        if lines and re.fullmatch(r"(id|index|number|label)[\s,;]+(name|class|label)", lines[0], re.IGNORECASE):
            lines = lines[1:]
        split = [re.fullmatch(r"(\d+)(?:\s*[,;\t]\s*|\s+)(.+)", line) for line in lines]
        numbered = [(int(found[1]), found[2].strip().strip('"')) for found in split if found]
        if len(numbered) == len(lines):
            first = min((number for number, _ in numbered), default=0)
            pairs = sorted((number - min(first, 1), name) for number, name in numbered)
        else:
            pairs = list(enumerate(lines))
    if [number for number, _ in pairs] != list(range(len(pairs))):
        raise UserError(f"{file}: the class numbers have gaps or repeat: expected consecutive numbers, each once")
    names = [name for _, name in pairs]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UserError(f"{file}: the class {twice!r} is named more than once: expected each name once")
    return tuple(names)


def _classes_of_json(file: str) -> list[tuple[int, str]]:
    numbers = _json(file)
    values = list(numbers.values()) if isinstance(numbers, dict) else [None]
    whole = [whole_number(str(value)) for value in values]
    if not isinstance(numbers, dict) or None in whole:
        raise UserError(f"{file}: expected a JSON object of class names and numbers, {{name: number}}")
    return sorted((number, name) for number, name in zip(whole, numbers, strict=True) if number is not None)


def _json(file: str) -> Any:
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: the file is not valid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}:1: the file is not valid JSON: its brackets are nested too deep") from error


def _number(file: str, line: int, name: str, classes: tuple[str, ...]) -> int:
    try:
        return _numbers(classes)[name]
    except KeyError as error:
        raise UserError(
            f"{file}:{line}: the class {name!r} is not one of the {len(classes)} known classes "
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
