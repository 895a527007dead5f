"""Files that are taken for weights but are something else, told by their content, with what to do instead."""

from __future__ import annotations

import zipfile
from pathlib import Path

from mvd_scale.errors import UserError

_CONVERT = "convert its arrays to safetensors first, under the names that the model has in torch"
_SAVE = "save its weights alone by `torch.save`"
_UNPACK = "unpack it, and name the file of weights in it"

_BY_HEAD = (
    (b"version https://git-lfs", "a pointer of git LFS, not the file itself: fetch that with `git lfs pull`"),
    (b"<", "a page of a server, not weights: open it as text to see the reason, and download the file again"),
    (b"\x1f\x8b", f"compressed by gzip: {_UNPACK}"),
    (b"BZh", f"compressed by bzip2: {_UNPACK}"),
    (b"\xfd7zXZ", f"compressed by xz: {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"compressed by Zstandard: {_UNPACK}"),
    (b"\x89HDF", f"an HDF5 file, such as of Keras: {_CONVERT}"),
    (b"\x93NUMPY", f"an array of numpy: {_CONVERT}"),
    (b"GGUF", f"a GGUF file: {_CONVERT}"),
)
_TAR_MARK = slice(257, 262)

_BY_MEMBER = (
    ("constants.pkl", f"a program of TorchScript: {_SAVE}, `torch.jit.load(FILE).state_dict()`"),
    ("archive_format", f"a program of `torch.export`: {_SAVE}, `torch.export.load(FILE).state_dict`"),
    (".npy", f"an archive of numpy (npz): {_CONVERT}"),
)
"""Kinds of zip archives, by the end of the name of a member."""


def refuse_other_kinds(path: Path) -> None:
    """Check that a file is not of a kind that is known to be no weights of torch.

    Raises:
        UserError: it is; the message says what it is, and what to do.
    """
    with path.open("rb") as file:
        head = file.read(_TAR_MARK.stop)
    told = next((said for mark, said in _BY_HEAD if head.lstrip().startswith(mark)), None)
    if head[_TAR_MARK] == b"ustar":
        told = f"a tar archive: {_UNPACK}"
    if told is None and head.startswith(b"PK"):
        told = _kind_of_zip(path)
    if told is not None:
        raise UserError(f"{path} is {told}")


def _kind_of_zip(path: Path) -> str | None:
    """Kind of a zip archive; None for one of `torch.save`, which has `NAME/data.pkl`, and for a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    found = next((said for end, said in _BY_MEMBER if any(name.endswith(end) for name in names)), None)
    if found is None and not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return f"a zip archive: {_UNPACK}"
    return found
