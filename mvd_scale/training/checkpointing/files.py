"""Record of the files of a checkpoint, by which one is recognised that lost some of them, their ends or single bytes.

A full disk, a host that goes down before its disk has everything, a copy that is cut off and a failing disk do that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from mvd_scale.utils.io import is_plain_name, write_atomic

_RECORD = "files.json"
_THREADS = 8
"""Files that are read at the same time; hashing runs outside Python's lock."""


class FileRecord(TypedDict):
    """Properties by which a file is recognised as whole."""

    bytes: int
    sha256: str


Record = dict[str, FileRecord]
"""Records of the files of a checkpoint by name."""


def describe_files(files: Iterable[Path]) -> Record:
    """Read files, and compute the record of each by its name."""
    return {file.name: FileRecord(bytes=file.stat().st_size, sha256=_hash(file)) for file in files}


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a checkpoint's files beside them, and flush the folder to disk."""
    write_atomic(folder / _RECORD, json.dumps(record, indent=1, sort_keys=True))
    flush_folder(folder)


def recorded_bytes(folder: Path) -> int:
    """Sum of the sizes of a checkpoint's files in bytes, by their record."""
    record: Record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    return sum(file["bytes"] for file in record.values())


def find_damage(folder: Path) -> str | None:
    """Find a file of a checkpoint that is missing, cut off or altered: name and fault; None if all are whole.

    All files are read.
    """
    try:
        record: Record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        sizes = {name: int(expected["bytes"]) for name, expected in record.items() if expected["sha256"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its list of files, {_RECORD}, is missing or cut off"
    for name, size in sizes.items():
        if not is_plain_name(name):
            return f"its list of files names {name!r}, which is no file beside it"
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        found = file.stat().st_size
        if found != size:
            return f"{name} has {found} of {size} bytes"
    with ThreadPoolExecutor(_THREADS) as pool:
        for (name, expected), found_hash in zip(
            record.items(), pool.map(lambda name: _hash(folder / name), record), strict=True
        ):
            if found_hash != expected["sha256"]:
                return f"{name} holds other bytes than were written"
    return None


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, so that a renamed file keeps its new name when the host goes down.

    Does nothing on file systems that cannot flush a folder, as some of FUSE and CIFS.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _hash(file: Path) -> str:
    whole = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 22):
            whole.update(chunk)
    return whole.hexdigest()
