"""Whether Triton can compile on this machine.

Triton compiles more than kernels: at its first use on a GPU it builds its driver module, and in some releases a
launcher for each kernel, with a C compiler and the headers of Python (`triton/runtime/build.py`). Many containers have
neither.
"""

from __future__ import annotations

import subprocess
import sysconfig
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_SOURCE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "mvd_kernels_probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_mvd_kernels_probe(void) { return PyModule_Create(&definition); }
"""
"""Smallest module of Python in C."""


@cache
def triton_refusal() -> str:
    """Reason why Triton is not usable on this machine, with the remedy; empty if it is.

    Builds an empty module as Triton builds its own, which takes a fraction of a second once: Triton keeps it in its
    cache, like all that it compiles. With a GPU, Triton's driver module is built and loaded too.
    """
    # A damaged package may raise any exception while it loads, and a build runs programs that may fail in any way.
    try:
        runtime = import_module("triton.runtime")
        build = import_module("triton.runtime.build")
    except ModuleNotFoundError as error:
        return f"{error}: pip install triton (comes with torch on Linux)"
    except Exception as error:
        return f"Triton is broken: {_first_line(error)}"
    try:
        build.compile_module_from_src(_SOURCE, "mvd_kernels_probe")
    except Exception as error:
        return f"Triton cannot compile: {_explain(error)}"
    return _driver_refusal(runtime) if torch.cuda.is_available() else ""


def _driver_refusal(runtime: Any) -> str:
    try:
        runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton cannot load the GPU's driver: {_first_line(error)}"
    return ""


def _explain(error: Exception) -> str:
    """Cause and remedy of a failed build."""
    if isinstance(error, subprocess.CalledProcessError):
        header = Path(sysconfig.get_path("include"), "Python.h")
        if not header.is_file():
            return f"{header} is missing: install python3-dev (Debian, Ubuntu) or python3-devel (Fedora, RHEL)"
        return f"{error.cmd[0]} ends with exit code {error.returncode}, see its own message"
    if isinstance(error, FileNotFoundError) or "compiler" in str(error):
        return f"{_first_line(error)}; install gcc, or set CC to the path of a C compiler"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
