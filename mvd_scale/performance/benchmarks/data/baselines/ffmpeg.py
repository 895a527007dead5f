"""FFmpeg's libraries for packages that come without them: those of PyAV, so that all loaders decode by the same code.

SPDL and torchcodec look for FFmpeg's libraries on the system, under their usual names (libavcodec.so.62). PyAV's wheels
have them in `av.libs`, under names with a hash (libavcodec-5e6b81c2.so.62.28.102).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_NAME = re.compile(r"(lib(?:av|sw)\w+)-[0-9a-f]+(\.so\.\d+)[.\d]*")


@contextmanager
def lend_ffmpeg(folder: Path) -> Iterator[None]:
    """Context in which new processes find PyAV's libraries of FFmpeg under their usual names.

    Nothing changes where PyAV comes without them: packages then find those of the system.

    Args:
        folder: folder for links to the libraries.
    """
    spec = find_spec("av")
    assert spec is not None
    assert spec.origin is not None
    libraries = Path(spec.origin).parents[1] / "av.libs"
    before = os.environ.get("LD_LIBRARY_PATH")
    links = link_libraries(libraries, folder / "ffmpeg")
    # Libraries name each other by the names with a hash.
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(links), str(libraries), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["LD_LIBRARY_PATH"]
        else:
            os.environ["LD_LIBRARY_PATH"] = before


def link_libraries(libraries: Path, folder: Path) -> Path:
    """Make links to the libraries of FFmpeg in `libraries`, by their usual names, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries.glob("lib*"):
        if (match := _NAME.fullmatch(library.name)) is not None:
            link = folder / "".join(match.groups())
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return folder
