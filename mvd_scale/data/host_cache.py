"""Files of columns that one process of a host makes and all of them map.

They lie in the temporary folder (`TMPDIR`): on the host itself, so that pages are read from no network, and apart from
the data, whose folders may be read-only. A file appears whole, by a rename after it has reached the disk. Whoever needs
it first makes it under a lock of the kernel, which ends with its process; a part that a killed process leaves goes with
the next. Files that nobody has opened for some days (`KEPT_DAYS`) go when another one is made.

Workers import this module: it must not import torch.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from mvd_scale.data.columns import ColumnFile, TornFileError, in_memory

KEPT_DAYS = {"order": 1, "manifest": 14}
"""Days since a file was last opened after which it goes, by the first word of its name. Every epoch has an order of its
own: those of a day take 4 bytes for each clip that a run draws in it."""

log = logging.getLogger("mvd_scale")


def cache_folder() -> Path:
    """Folder of this user's files of columns on this host."""
    return Path(tempfile.gettempdir()) / f"mvd_scale-{os.getuid()}"


def open_or_make(name: str, what: str, write: Callable[[BinaryIO], None]) -> ColumnFile:
    """Map the file of a name, which is made before unless it is there.

    If the folder cannot be written or is full, a warning says so, and this process holds the columns in memory that it
    shares with its workers alone.

    Args:
        name: name of the file, which determines its content and begins with a key of `KEPT_DAYS`.
        what: the content, for messages.
        write: function that writes the columns to an empty file, see `ColumnWriter`.
    """
    try:
        return _open_or_make(_own_folder() / name, what, write)
    except OSError as error:
        _warn(what, cache_folder(), str(error.strerror or error))
        return in_memory(write)


def make_unnamed(what: str, write: Callable[[BinaryIO], None]) -> ColumnFile:
    """Write columns to a file without a name, which ends with the processes that map it.

    Its pages go to disk if memory is short; if the folder cannot be written or is full, a warning says so, and they
    stay in memory.

    Args:
        what: the content, for messages.
        write: as for `open_or_make`.
    """
    try:
        with open_unnamed(what) as file:
            write(file)
            return ColumnFile(os.dup(file.fileno()))
    except OSError as error:
        _warn(what, cache_folder(), str(error.strerror or error))
        return in_memory(write)


def open_unnamed(what: str) -> BinaryIO:
    """Open an empty file without a name for writing and reading, which ends with this process.

    Its pages go to disk if memory is short; if the folder cannot be written, a warning says so, and they stay in
    memory.

    Args:
        what: the content, for messages.
    """
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(dir=_own_folder()))
    except OSError as error:
        _warn(what, cache_folder(), str(error.strerror or error))
        return os.fdopen(os.memfd_create("mvd_scale", os.MFD_CLOEXEC), "w+b")


@lru_cache
def _warn(what: str, folder: Path, reason: str) -> None:
    """Warn once that something stays in memory: an index of a shard, for example, is one of thousands."""
    log.warning(
        "%s cannot be kept in %s: %s. This process and its workers hold it in memory of their own. Free space there, "
        "or set TMPDIR to a folder on a local disk",
        what,
        folder,
        reason,
    )


def _own_folder() -> Path:
    folder = cache_folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if status.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        raise PermissionError(f"{folder} is no folder of this user")
    return folder


def _open_or_make(path: Path, what: str, write: Callable[[BinaryIO], None]) -> ColumnFile:
    found = _open(path, what)
    if found is not None:
        return found
    with _locked(path.with_suffix(".lock")):
        found = _open(path, what)  # another process may have made it meanwhile
        if found is not None:
            return found
        _remove_unused(path.parent)
        log.info("%s is written to %s, once for all processes of this host", what, path)
        for left in path.parent.glob(f"{path.stem}.*.partial"):  # by processes that were killed
            left.unlink(missing_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                write(file)
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(path)
        _sync_folder(path.parent)
        return ColumnFile.open(path)


def _open(path: Path, what: str) -> ColumnFile | None:
    try:
        columns = ColumnFile.open(path)
    except FileNotFoundError:
        return None
    except (TornFileError, ValueError):
        log.warning("%s, which holds %s, is not whole: it is made again", path, what)
        return None
    # The time of the last use, by which unused files are found.
    with suppress(OSError):
        os.utime(path)
    return columns


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.utime(descriptor)  # `_remove_unused` takes no lock of a file that is being made
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unused(folder: Path) -> None:
    # Processes that have mapped a file keep it when its name goes.
    for path in folder.iterdir():
        days = KEPT_DAYS.get(path.name.partition("-")[0], 0)
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > days * 86400:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
