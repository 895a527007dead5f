"""Fixtures: a Python that has some packages only."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[4]

TORCH = (
    "torch", "functorch", "torchgen", "numpy", "numpy.libs", "triton", "typing_extensions.py", "sympy", "mpmath",
    "networkx", "jinja2", "markupsafe", "fsspec", "filelock", "packaging",
)  # fmt: skip
"""Modules of torch, Triton, numpy and what torch requires."""

BarePython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def bare_python(tmp_path: Path) -> BarePython:
    """Run a command with an environment whose Python has torch, Triton, numpy, and some further modules, but no others.

    `$MVD_PYTHON` is that Python.
    """
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    installed = Path(torch.__file__).parents[1]

    def run(*words: str | Path, modules: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
        for name in (*TORCH, *modules):
            # torch finds its backends of collectives in its metadata.
            for path in (installed / name, *installed.glob(f"{name}-*.dist-info")):
                if path.exists():
                    (site / path.name).symlink_to(path)
        # DALI is a part of this namespace.
        (site / "nvidia").mkdir()
        for part in (installed / "nvidia").iterdir():
            if part.name != "dali":
                (site / "nvidia" / part.name).symlink_to(part)
        python = tmp_path / "venv" / "bin" / "python"
        return subprocess.run(
            [str(python) if word == "python" else str(word) for word in words],
            env={"PATH": os.environ["PATH"], "MVD_PYTHON": str(python), **env},
            cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False,
        )  # fmt: skip

    return run
