"""Bytes of videos, from files, shards and fsspec URLs, with a limit on how long one may wait for them."""

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
    """A video that cannot give the frames asked for."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def is_url(path: str) -> bool:
    """Whether fsspec opens a path, rather than the operating system."""
    return "://" in path


def absolute(path: str) -> str:
    """A path from anywhere; URLs are."""
    return path if is_url(path) else os.path.abspath(path)


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        UserError: nothing here speaks its protocol.
    """
    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be opened: {error}") from error
    return filesystem, inner


def read_bytes(path: str, offset: int = WHOLE_FILE, size: int = 0) -> NDArray[np.uint8]:
    """A whole encoded file, or one range of a shard: uint8 (bytes,).

    Raises:
        DecodeError: it cannot be read, is empty, or ends before the range does.
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
    # What a remote store's library raises is its own affair: a video that cannot be read must not end a run.
    except Exception as error:
        if not is_url(path):
            raise
        raise DecodeError(path, f"{type(error).__name__}: {error}") from error
    if not data:
        raise DecodeError(path, "empty file")
    if offset != WHOLE_FILE and len(data) < size:
        raise DecodeError(path, f"ends {size - len(data)} bytes early")
    return np.frombuffer(data, dtype=np.uint8)


def within(seconds: float, path: str, work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` returns or raises, unless it takes too long.

    A read from a dead network mount cannot be interrupted: it is left behind in its thread.

    Raises:
        DecodeError: it took longer than `seconds`; `path` names the video.
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
