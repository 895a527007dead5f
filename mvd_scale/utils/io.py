"""Atomic writes, names of files, and files of JSON lines."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger("mvd_scale")

_TAIL_BYTES = 1 << 16
"""Bytes at the end of a file of metrics that hold its last reading."""


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under another name, flush it to disk and rename it, so that it is never partial."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append_whole(path: Path, content: bytes) -> int:
    """Append lines to a file, all of the content or nothing, and return the size of the file in bytes.

    A last line that a killed process wrote partially is ended first.

    Raises:
        OSError: the content could not be written; a part that was written is removed, unless other processes have
            appended since.
    """
    with path.open("a+b", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before and os.pread(file.fileno(), 1, before - 1) != b"\n":
            content = b"\n" + content
        written = 0
        try:
            while written < len(content):
                written += file.write(content[written:])
        except OSError:
            # Lines that other processes have appended meanwhile stay.
            if file.seek(0, os.SEEK_END) == before + written:
                file.truncate(before)
            raise
        return file.tell()


def append_json_line(path: Path, document: dict[str, Any]) -> bool:
    """Append a line of JSON to a log; if it cannot be written, a warning says so, and the run goes on.

    Returns:
        whether the line was written.
    """
    try:
        append_whole(path, (json.dumps(document) + "\n").encode())
        return True
    except OSError as error:
        logger.warning("%s cannot be written: %s; a line of it is lost", path, error.strerror)
        return False


def is_plain_name(name: Any) -> bool:
    """Whether a name that was read from a file is that of a file or folder beside it, and leads to no other place."""
    return isinstance(name, str) and "\0" not in name and name not in ("", ".", "..") and Path(name).name == name


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing, partial or holds something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all documents of a file of JSON lines, oldest first; skips lines that a killed process wrote partially."""
    readings = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            reading = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(reading, dict):
            readings.append(reading)
    return readings


def last_metrics(path: Path) -> dict[str, Any] | None:
    """Read the last whole reading of a `metrics.jsonl` from its end; None without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return None
    # A line without its end is still being written, or was when its process was killed.
    for line in reversed(tail.rpartition(b"\n")[0].splitlines()):
        try:
            reading = json.loads(line)
        except ValueError:
            continue
        if isinstance(reading, dict) and "step" in reading:
            return reading
    return None


def truncate_metrics(path: Path, step: int) -> None:
    """Remove readings after a step: a resumed run repeats the steps after its checkpoint."""
    if path.is_file():
        kept = [json.dumps(reading) + "\n" for reading in read_metrics(path) if reading["step"] <= step]
        write_atomic(path, "".join(kept))
