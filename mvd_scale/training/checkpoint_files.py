"""Record of the files of a checkpoint, by which one is recognised that lost some of them or their ends.

A full disk, a host that goes down before its disk has everything, or a copy that is cut off leave a checkpoint torn.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mvd_scale.utils.io import write_atomic

_RECORD = "files.json"
_ZIPS = frozenset({".pt", ".pth"})


def record_files(folder: Path) -> None:
    """Write the sizes of all files of a checkpoint, in bytes, to a file beside them."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    write_atomic(folder / _RECORD, json.dumps(sizes, indent=1))


def find_damage(folder: Path) -> str | None:
    """Find a file of a checkpoint that is missing, cut off or not readable: name and fault; None if all are whole.

    Only sizes and directories of files are read, no tensors.
    """
    try:
        sizes: dict[str, int] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"its list of files, {_RECORD}, is missing or cut off"
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} {'is missing' if found is None else f'has {found} of {size} bytes'}"
        reason = _damage_of_file(file)
        if reason:
            return f"{name} {reason}"
    return None


def _damage_of_file(file: Path) -> str | None:
    """Find the fault of a file of the right size, such as one whose end was never written to the disk."""
    try:
        if file.suffix in _ZIPS:
            with zipfile.ZipFile(file):
                return None
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return None
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        return f"is damaged ({error})"
    return None
