"""Whether Triton can compile: by its own build, with a reason and a remedy for each way in which it fails."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvd_kernels.triton_compiler import triton_refusal

triton = pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A machine on which Triton has compiled nothing yet, for tests to change."""
    from triton.runtime import build

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    # Newer releases remember the compiler that they found.
    forget = getattr(getattr(build, "_find_compiler", None), "cache_clear", lambda: None)
    triton_refusal.cache_clear()
    forget()
    yield monkeypatch
    triton_refusal.cache_clear()
    forget()


def test_triton_compiles_here(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("gcc") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("this machine lacks gcc or the headers of Python")
    assert triton_refusal() == ""
    assert list((tmp_path / "cache").rglob("mvd_kernels_probe*")), "the next process finds it"


def test_no_compiler(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setenv("PATH", str(tmp_path))
    assert triton_refusal().startswith("Triton cannot compile: ")
    assert triton_refusal().endswith("; install gcc, or set CC to the path of a C compiler")


def test_a_compiler_that_is_not_there(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("CC", "/nowhere/gcc")
    assert "/nowhere/gcc" in triton_refusal()
    assert "set CC" in triton_refusal()


def test_a_compiler_that_fails(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("CC", shutil.which("false") or "false")
    assert "false ends with exit code 1" in triton_refusal()


def test_headers_that_are_missing_are_named(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setenv("CC", shutil.which("false") or "false")
    machine.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"{tmp_path}/Python.h is missing: install python3-dev" in triton_refusal()


def test_a_cache_that_cannot_be_written(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("this machine lacks gcc")
    (tmp_path / "file").touch()
    machine.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert f"{tmp_path}/file" in triton_refusal()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'triton'", name="triton"),
            "No module named 'triton': pip",
        ),
        (OSError("libtriton.so: undefined symbol\nmore"), "Triton is broken: libtriton.so: undefined symbol"),
        (AssertionError(), "Triton is broken: AssertionError"),
    ],
)
def test_a_package_that_is_missing_or_damaged(machine: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def refuse(module: str) -> None:
        raise error

    machine.setattr("mvd_kernels.triton_compiler.import_module", refuse)
    assert triton_refusal().startswith(said)


@pytest.mark.parametrize("error", [None, AssertionError("libcuda.so cannot found!\nrun ldconfig"), RuntimeError()])
def test_a_gpu_whose_driver_triton_does_not_find(machine: pytest.MonkeyPatch, error: Exception | None) -> None:
    def answer() -> str:
        if error:
            raise error
        return "cuda"

    runtime = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(get_current_target=answer)))
    machine.setitem(sys.modules, "triton.runtime", runtime)  # type: ignore[misc]
    build = SimpleNamespace(compile_module_from_src=lambda source, name: None)
    machine.setitem(sys.modules, "triton.runtime.build", build)  # type: ignore[misc]
    assert triton_refusal() == "", "no GPU, no driver"
    triton_refusal.cache_clear()
    machine.setattr(torch.cuda, "is_available", lambda: True)
    assert triton_refusal().partition(": ")[2] == (str(error).partition("\n")[0] or "RuntimeError" if error else "")
