"""Compilation of the C++ files of this folder to a library for exactly this CPU, cached in the user's home."""

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
from torch.profiler import record_function

logger = logging.getLogger("mvd_kernels")

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-std=c++17")


def library() -> ctypes.CDLL | None:
    """Return the library of compiled functions, or None if they cannot be compiled; `build_error` gives the reason."""
    return _build()[0]


def build_error() -> str:
    """Reason why there is no library; empty if there is one."""
    return _build()[1]


@cache
def _build() -> tuple[ctypes.CDLL | None, str]:
    compiler = shutil.which("c++")
    if compiler is None:
        return None, "no C++ compiler (c++) on PATH: install g++"
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    try:
        # The predefined macros identify the compiler's version and every instruction set of this CPU.
        macros = _run(compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
        key = hashlib.sha256(
            b"".join([" ".join(_FLAGS).encode(), macros.encode(), *(source.read_bytes() for source in sources)])
        ).hexdigest()
        file = Path.home() / ".cache" / "mvd_kernels" / f"{key[:32]}.so"
        if not file.exists():
            logger.info("compiling the C++ operators for this CPU: about 10 s, once per machine")
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
                made = Path(scratch, file.name)
                _run(compiler, *_FLAGS, "-w", "-shared", "-o", str(made), *map(str, sources))
                # Ranks that start at the same time each compile one; the first is kept, as others may have loaded it.
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
    """Call a compiled function; profilers of torch see it by its name.

    Args:
        name: name of the function.
        tensors: contiguous tensors on the CPU, passed as pointers.
        numbers: integers, passed as int64; the number of threads is appended to them.
    """
    function = getattr(library(), name)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    with record_function(name):
        function(*pointers, *map(ctypes.c_int64, (*numbers, torch.get_num_threads())))
