"""Reading of a list as a table: its encoding, the character between its fields, its header, its records.

A record is the number of its first line in the file, from 1, and its fields.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mvd_scale.data.filesystem import is_media, open_file
from mvd_scale.errors import UserError

Record = tuple[int, list[str]]

CLEAR_PATH_COLUMNS = ("path", "file_path", "filepath", "video_path", "clip_path")
"""Columns that are the path of the video, whatever other columns there are."""

PATH_COLUMNS = (*CLEAR_PATH_COLUMNS, "file", "filename", "file_name", "video", "video_name", "video_id")
LABEL_COLUMNS = ("label", "class", "label_id", "class_id", "class_name", "category")
KINETICS_COLUMNS = frozenset({"youtube_id", "time_start", "time_end"})

_DELIMITERS = ("\t", ";", ",")
_SPACE = " "
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_ENCODINGS = (
    # The mark of UTF-16 is the beginning of that of UTF-32.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LONGEST_NUMBER = 300
"""Characters; Python converts no text of some thousand digits."""

_LARGEST_LABEL = 2**31 - 1

csv.field_size_limit(_LARGEST_LABEL)  # columns of captions and boxes are longer than the 128 KB of the default


@dataclass(frozen=True)
class Table:
    """The records of a list."""

    file: str
    """Path or URL of the list, for messages."""

    records: list[Record]
    """Records that are not blank, without the header."""

    header: list[str] = field(default_factory=list)
    """Names of the columns, in lower case; empty if the list has no header."""

    delimiter: str = _SPACE
    """Character between fields. With a space, a record is a path, which may hold spaces, and its last word."""


def read_text(file: str) -> str:
    """Text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        UserError: the file cannot be read, is in no such encoding, or is not text.
    """
    try:
        with open_file(file) as opened:
            data = opened.read()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}. Expected a text file") from error
    encoding = next((name for mark, name in _ENCODINGS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file} is not a text file: expected a list of videos in UTF-8, or in UTF-16 with a byte order mark, or a "
            f"folder of videos. The first byte that is no text is {data[error.start]:#04x}, near line {before}"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{file} is not a text file: expected a list of videos in UTF-8, or in UTF-16 with a byte order mark, or a "
            f"folder of videos. The first null character is in line {line}"
        )
    return text


def read_table(file: str) -> Table:
    """Read a list; the character between its fields and whether it has a header are seen from its content.

    Raises:
        UserError: the file is empty or not text, or a quote in it is not closed.
    """
    table = _read_table(file, read_text(file))
    if not table.records:
        raise UserError(f"the list {file} is empty: expected one `path label` per line, or a CSV file with a header")
    return table


def whole_number(text: str) -> int | None:
    """The whole number that a text writes, as in `2`, `2.0`, ` 2`, `+2` or `2e0`; None if it writes none."""
    if len(text) > _LONGEST_NUMBER:
        return None
    if text.isdecimal():
        return int(text)
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return int(text)
    except ValueError:
        value = float(text)
        return int(value) if value.is_integer() else None


def label_number(text: str) -> int | None:
    """The class that a text writes as a whole number, -1 for an empty one; None if it is no number of a class."""
    number = whole_number(text) if text.strip() else -1
    return None if number is None or number > _LARGEST_LABEL else max(number, -1)


def _read_table(file: str, text: str) -> Table:
    skipped = 0
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    told = re.fullmatch(r'"?sep=(.)"?', first.strip(), re.IGNORECASE)
    if told:
        # Line by which spreadsheets tell each other the delimiter.
        skipped = text[: text.index(first)].count("\n") + 1
        text = text[text.index(first) + len(first) :]
        first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    delimiters = (told[1],) if told else _DELIMITERS
    for delimiter in delimiters:
        header = _header(first, delimiter)
        if _is_header(header):
            _, *records = _parsed(file, text, delimiter, skipped)
            return Table(file, records, header, delimiter)
    words = _header(first, _SPACE)
    if len(words) > 1 and set(words) <= {*PATH_COLUMNS, *LABEL_COLUMNS} and _is_header(words):
        _, *records = _words(text, skipped)
        return Table(file, records, words)
    return _without_header(file, text, [delimiter for delimiter in delimiters if delimiter in text], skipped)


def _header(line: str, delimiter: str) -> list[str]:
    try:
        names = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return []
    return [name.strip().lower() for name in names if name.strip() or delimiter != _SPACE]


def _is_header(names: Sequence[str]) -> bool:
    return set(names) >= KINETICS_COLUMNS or not set(PATH_COLUMNS).isdisjoint(names)


def _without_header(file: str, text: str, delimiters: Sequence[str], skipped: int) -> Table:
    """The table by the delimiter that makes most sense of its records; by spaces, if several make as much."""
    tables = [Table(file, list(_words(text, skipped)))]
    faults: dict[str, UserError] = {}
    for delimiter in delimiters:
        records: list[Record] = []
        try:
            for record in _records(file, text, delimiter, skipped):
                records.append(record)
        except UserError as error:
            faults[delimiter] = error
        tables.append(Table(file, records, [], delimiter))
    best = max(tables, key=_sense) if len(tables) > 1 else tables[0]
    if best.delimiter in faults:
        raise faults[best.delimiter]
    return best


def _sense(table: Table) -> int:
    """Number of fields in which a table shows what a list consists of: paths of videos first, whole numbers last."""
    sense = 0
    for _, fields in table.records:
        if len(fields) > 1:
            sense += (fields[-1].isdecimal() or whole_number(fields[-1]) is not None) + is_media(fields[0])
    return sense


def _parsed(file: str, text: str, delimiter: str, skipped: int) -> list[Record]:
    return list(_records(file, text, delimiter, skipped))


def _records(file: str, text: str, delimiter: str, skipped: int) -> Iterator[Record]:
    """Records of a csv; a quoted field may hold line breaks.

    Raises:
        UserError: a quote is not closed, or text follows a closed one.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    try:
        for fields in reader:
            if any(map(str.strip, fields)):
                yield line + skipped, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}:{line + skipped}: the fields cannot be told apart ({error}): close every quote, and write a "
            "quote within a quoted field twice"
        ) from error


def _words(text: str, skipped: int) -> Iterator[Record]:
    """Records of a list by spaces: the path, in quotes or not, and the last word of the line."""
    for number, line in enumerate(io.StringIO(text, newline=""), start=1 + skipped):
        words = _quoted(line) if '"' in line else line.rsplit(None, 1)
        if words:
            words[0] = words[0].strip()
            yield number, words


def _quoted(line: str) -> list[str]:
    try:
        words = next(csv.reader([line.strip()], delimiter=_SPACE, skipinitialspace=True, strict=True))
    except csv.Error:
        return line.rsplit(None, 1)
    return words if len(words) == 2 and all(words) else line.rsplit(None, 1)
