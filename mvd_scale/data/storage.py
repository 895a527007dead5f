"""Reading of encoded videos from files, shards and fsspec URLs, with a time limit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.manifest import WHOLE_FILE
from mvd_scale.errors import UserError

T = TypeVar("T")


class DecodeError(Exception):
    """A video cannot be read, or does not have the requested frames."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def is_url(path: str) -> bool:
    """Whether a path is a URL, which fsspec opens, and not a path of the operating system."""
    return "://" in path


def absolute(path: str) -> str:
    """Absolute path; a URL is returned unchanged."""
    return path if is_url(path) else os.path.abspath(path)


def filesystem_of(url: str) -> tuple[Any, str]:
    """File system of a URL by fsspec, and the path in that file system.

    Raises:
        UserError: the protocol is unknown, or the package that implements it is not installed.
    """
    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be opened: {error}") from error
    return filesystem, inner


def read_bytes(path: str, offset: int = WHOLE_FILE, size: int = 0) -> NDArray[np.uint8]:
    """Read a whole file, or one range of a shard: uint8 (bytes,).

    Args:
        path: path or URL.
        offset: first byte of the range; `WHOLE_FILE` for the whole file.
        size: number of bytes of the range.

    Raises:
        DecodeError: the file cannot be read, is empty, or ends before the end of the range.
    """
    try:
        if is_url(path):
            filesystem, inner = filesystem_of(path)
            end = None if offset == WHOLE_FILE else offset + size
            data = filesystem.cat_file(inner, start=None if offset == WHOLE_FILE else offset, end=end)
        else:
            with open(path, "rb", buffering=0) as file:
                if offset != WHOLE_FILE:
                    file.seek(offset)
                data = file.read(-1 if offset == WHOLE_FILE else size)
    except OSError as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    # The library of a remote store may raise exceptions of any type: an unreadable video must not end a run.
    except Exception as error:
        if not is_url(path):
            raise
        raise DecodeError(path, f"{type(error).__name__}: {error}") from error
    if not data:
        raise DecodeError(path, "empty file")
    if offset != WHOLE_FILE and len(data) < size:
        raise DecodeError(path, f"the shard ends {size - len(data)} bytes before the end of the video")
    return np.frombuffer(data, dtype=np.uint8)


def run_with_timeout(seconds: float, path: str, work: Callable[..., T], *arguments: Any) -> T:
    """Call `work(*arguments)` with a time limit in seconds; return its result, or raise its exception.

    The call runs in a thread of its own. A read from a dead network mount cannot be interrupted: after the time limit,
    its thread is abandoned.

    Raises:
        DecodeError: the call took longer than `seconds`; `path` names the video.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work(*arguments))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DecodeError(path, f"not read within {seconds:g} s")
    if failure:
        raise failure[0]
    return result[0]
