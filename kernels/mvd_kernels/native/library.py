"""From the C++ files of this folder to a library for exactly this CPU, kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("mvd_kernels")

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-std=c++17")


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be compiled: `why_not` says why."""
    return _build()[0]


def why_not() -> str:
    """Why there is no library; empty if there is one."""
    return _build()[1]


@cache
def _build() -> tuple[ctypes.CDLL | None, str]:
    compiler = shutil.which("c++")
    if compiler is None:
        return None, "no C++ compiler (c++) on PATH: install g++"
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    try:
        # Its own macros name the compiler's version and every instruction set of this CPU.
        macros = _run(compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
        key = hashlib.sha256(
            b"".join([" ".join(_FLAGS).encode(), macros.encode(), *(source.read_bytes() for source in sources)])
        ).hexdigest()
        file = Path.home() / ".cache" / "mvd_kernels" / f"{key[:32]}.so"
        if not file.exists():
            logger.info("compiling the operators for this CPU, once: about 10 s")
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
                made = Path(scratch, file.name)
                _run(compiler, *_FLAGS, "-w", "-shared", "-o", str(made), *map(str, sources))
                # Ranks that start together each make one, and the first stays: others may run it by now.
                with suppress(FileExistsError):
                    file.hardlink_to(made)
        return ctypes.CDLL(str(file)), ""
    except (OSError, RuntimeError) as error:
        return None, str(error).splitlines()[0]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def call(name: str, tensors: tuple[Tensor, ...], *numbers: int) -> None:
    """Run a function on contiguous tensors of the CPU; its last argument is the number of threads."""
    function = getattr(library(), name)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function(*pointers, *map(ctypes.c_int64, (*numbers, torch.get_num_threads())))
