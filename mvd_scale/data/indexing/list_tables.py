"""Reading of a list as a table: its encoding, the character between its fields, its header, its records.

A record is the number of its first line in the file, from 1, and its fields. The text and the records of a long list
lie on disk; memory holds a piece of them.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import BinaryIO

from mvd_scale.data.filesystem import is_media, open_file
from mvd_scale.data.host_cache import open_unnamed
from mvd_scale.data.spool import Stored, store
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

_PIECE = 2**20
"""Bytes of a file that are decoded at a time."""

csv.field_size_limit(_LARGEST_LABEL)  # columns of captions and boxes are longer than the 128 KB of the default


@dataclass(frozen=True)
class Table:
    """The records of a list."""

    file: str
    """Path or URL of the list, for messages."""

    records: Stored[Record]
    """Records that are not blank, without the header."""

    header: list[str] = field(default_factory=list)
    """Names of the columns, in lower case; empty if the list has no header."""

    delimiter: str = _SPACE
    """Character between fields. With a space, a record is a path, which may hold spaces, and its last word."""


@dataclass(frozen=True)
class _Text:
    """Lines of a text, each with its end, which can be gone through more than once."""

    spool: BinaryIO
    """File of the text in UTF-8."""

    skipped: int = 0
    """Lines at its beginning that are passed over."""

    def __iter__(self) -> Iterator[str]:
        with open(f"/proc/self/fd/{self.spool.fileno()}", encoding="utf-8", newline="") as lines:
            yield from islice(lines, self.skipped, None)


def read_text(file: str) -> str:
    """Text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        UserError: the file cannot be read, is in no such encoding, or is not text.
    """
    return "".join(_pieces(file))


def store_records(records: Iterable[Record]) -> Stored[Record]:
    """Keep records: few of them in a list, many on disk."""
    return store(records, list, lambda values: (values[0], values[1]))


def _spooled(file: str) -> _Text:
    spool = open_unnamed(f"the text of {file}")
    for piece in _pieces(file):
        spool.write(piece.encode())
    spool.flush()
    return _Text(spool)


def _pieces(file: str) -> Iterator[str]:
    """Yield the text of a file in pieces, see `read_text`."""
    lines = 0
    try:
        with open_file(file) as opened:
            piece = opened.read(_PIECE)
            encoding = next((name for mark, name in _ENCODINGS if piece.startswith(mark)), "utf-8-sig")
            decoder = codecs.getincrementaldecoder(encoding)()
            while piece:
                text = decoder.decode(piece)
                _check_text(file, text, lines)
                yield text
                lines += text.count("\n")
                piece = opened.read(_PIECE)
            yield decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}. Expected a text file") from error
    except UnicodeDecodeError as error:
        before = lines + error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file} is not a text file: expected a list of videos in UTF-8, or in UTF-16 with a byte order mark, or a "
            f"folder of videos. The first byte that is no text is {error.object[error.start]:#04x}, near line {before}"
        ) from error


def _check_text(file: str, text: str, lines: int) -> None:
    if "\0" in text:
        line = lines + text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{file} is not a text file: expected a list of videos in UTF-8, or in UTF-16 with a byte order mark, or a "
            f"folder of videos. The first null character is in line {line}"
        )


def read_table(file: str) -> Table:
    """Read a list; the character between its fields and whether it has a header are seen from its content.

    Raises:
        UserError: the file is empty or not text, or a quote in it is not closed.
    """
    table = _read_table(file, _spooled(file))
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


def _read_table(file: str, text: _Text) -> Table:
    place, first = _first_line(text)
    told = re.fullmatch(r'"?sep=(.)"?', first.strip(), re.IGNORECASE)
    if told:
        # Line by which spreadsheets tell each other the delimiter.
        text = replace(text, skipped=place + 1)
        _, first = _first_line(text)
    delimiters = (told[1],) if told else _DELIMITERS
    for delimiter in delimiters:
        header = _header(first, delimiter)
        if _is_header(header):
            return Table(file, store_records(islice(_records(file, text, delimiter), 1, None)), header, delimiter)
    words = _header(first, _SPACE)
    if len(words) > 1 and set(words) <= {*PATH_COLUMNS, *LABEL_COLUMNS} and _is_header(words):
        return Table(file, store_records(islice(_words(text), 1, None)), words)
    present = [delimiter for delimiter in delimiters if any(delimiter in line for line in text)]
    return _without_header(file, text, present)


def _first_line(text: _Text) -> tuple[int, str]:
    """The first line that is not blank, and the number of those before it; an empty one if all are blank."""
    return next(((number, line) for number, line in enumerate(text) if line.strip()), (0, ""))


def _header(line: str, delimiter: str) -> list[str]:
    try:
        names = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return []
    return [name.strip().lower() for name in names if name.strip() or delimiter != _SPACE]


def _is_header(names: Sequence[str]) -> bool:
    return set(names) >= KINETICS_COLUMNS or not set(PATH_COLUMNS).isdisjoint(names)


def _without_header(file: str, text: _Text, delimiters: Sequence[str]) -> Table:
    """The table by the delimiter that makes most sense of its records; by spaces, if several make as much."""
    faults: dict[str, UserError] = {}

    def until_fault(delimiter: str) -> Iterator[Record]:
        try:
            yield from _records(file, text, delimiter)
        except UserError as error:
            faults[delimiter] = error

    tables = [Table(file, store_records(_words(text)))]
    tables += [Table(file, store_records(until_fault(delimiter)), [], delimiter) for delimiter in delimiters]
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


def _records(file: str, text: _Text, delimiter: str) -> Iterator[Record]:
    """Records of a csv; a quoted field may hold line breaks.

    Raises:
        UserError: a quote is not closed, or text follows a closed one.
    """
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    try:
        for fields in reader:
            if any(map(str.strip, fields)):
                yield line + text.skipped, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}:{line + text.skipped}: the fields cannot be told apart ({error}): close every quote, and write a "
            "quote within a quoted field twice"
        ) from error


def _words(text: _Text) -> Iterator[Record]:
    """Records of a list by spaces: the path, in quotes or not, and the last word of the line."""
    for number, line in enumerate(text, start=1 + text.skipped):
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
