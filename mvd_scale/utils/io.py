"""Atomic writes, names of files, and files of JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under another name, flush it to disk and rename it, so that it is never partial."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def is_plain_name(name: Any) -> bool:
    """Whether a name that was read from a file is that of a file or folder beside it, and leads to no other place."""
    return isinstance(name, str) and "\0" not in name and name not in ("", ".", "..") and Path(name).name == name


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all readings of a `metrics.jsonl`, oldest first; skips a line that a killed process wrote partially."""
    readings = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            readings.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return readings


def truncate_metrics(path: Path, step: int) -> None:
    """Remove readings after a step: a resumed run repeats the steps after its checkpoint."""
    if path.is_file():
        kept = [json.dumps(reading) + "\n" for reading in read_metrics(path) if reading["step"] <= step]
        write_atomic(path, "".join(kept))
