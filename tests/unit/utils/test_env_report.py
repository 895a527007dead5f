"""Tests of `mvd-scale env`: it shows every capability on any machine, with a reason for each one that is off."""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import shutil
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch

from mvd_kernels import triton_compiler
from mvd_kernels.attention import FLASH_ATTENTION_RELEASES
from mvd_scale.utils import env_report as capabilities
from mvd_scale.utils.env_report import Capability, collect_capabilities, format_capabilities
from mvd_scale.utils.nvdec import Nvdec, NvdecFormat


class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that makes packages fail while they are imported, like a damaged installation."""

    def __init__(self, packages: Sequence[str], error: Exception) -> None:
        self.packages = packages
        self.error = error

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in self.packages else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        raise self.error

    def exec_module(self, module: ModuleType) -> None:
        raise AssertionError("never reached")


@pytest.fixture
def break_packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def break_with(error: Exception, *packages: str) -> None:
        for package in packages:
            monkeypatch.delitem(sys.modules, package, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(packages, error), *sys.meta_path])

    return break_with


def by_name(rows: list[Capability]) -> dict[str, Capability]:
    return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def rows() -> list[Capability]:
    return collect_capabilities()


def test_every_capability_has_a_row_and_every_row_that_is_off_a_reason(rows: list[Capability]) -> None:
    names = set(by_name(rows))
    assert {"Python", "CPU", "torch", "NCCL", "gloo", "bf16", "fp16", "DeepSpeed", "flash-attn", "apex"} <= names
    assert {"DALI", "PyAV", "Triton", "torch.compile, GPU", "torch.compile, CPU", "C++ and ninja"} <= names
    assert any(name.startswith("DeepSpeed ") for name in names), "no ops"
    assert len(names) == len(rows), "a capability is told twice"
    assert [row.name for row in rows if not row.on and not row.reason] == []


def test_the_table_has_one_line_for_each_row(rows: list[Capability]) -> None:
    lines = format_capabilities(rows).splitlines()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(row.name)
        assert line.removeprefix(row.name).split()[0] == ("on" if row.on else "off")
        assert row.detail in line
        assert row.reason in line


def test_deepspeed_is_probed_without_its_greeting(capfd: pytest.CaptureFixture[str]) -> None:
    capabilities._deepspeed()
    out, err = capfd.readouterr()
    assert "[WARNING]" not in out + err
    assert "INFO" not in out + err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("cannot import name 'x' from 'y'"), "broken: cannot import name 'x' from 'y'"),
        (
            OSError("libfoo.so.1: cannot open shared object file\nmore"),
            "broken: libfoo.so.1: cannot open shared object file",
        ),
        (RuntimeError("built for another torch"), "broken: built for another torch"),
        (ModuleNotFoundError("No module named 'gone'", name="gone"), "broken: No module named 'gone'"),
        (AssertionError(), "broken: AssertionError"),
    ],
)
def test_broken_packages_are_rows_with_the_error(
    error: Exception, said: str, break_packages: Callable[..., None]
) -> None:
    break_packages(error, "flash_attn", "apex", "triton", "av", "nvidia.dali", "deepspeed", "psutil")
    found = by_name(collect_capabilities())
    for name in ("apex", "Triton", "PyAV", "DALI", "DeepSpeed"):
        assert not found[name].on
        assert found[name].reason == said
    assert not found["flash-attn"].on
    assert "flash-attn-4" in found["flash-attn"].reason
    assert said.partition(": ")[2] in found["flash-attn"].reason
    assert said in found["CPU"].detail


@pytest.mark.parametrize("package", ["flash_attn", "apex", "triton", "av", "nvidia.dali", "deepspeed"])
def test_a_package_that_is_not_installed_says_how_to_get_it(package: str, break_packages: Callable[..., None]) -> None:
    break_packages(ModuleNotFoundError(f"No module named {package!r}", name=package), package)
    off = [row for row in collect_capabilities() if not row.on and row.reason.startswith("not installed: ")]
    assert off


def test_without_a_compiler_no_op_claims_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    rows = capabilities._deepspeed()
    assert not any(row.on for row in rows if row.name.startswith("DeepSpeed "))
    assert not capabilities._compiler().on


def test_both_builds_of_dali_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_version", lambda distribution: "2.4.0")
    (row,) = capabilities._dali()
    assert not row.on
    assert "nvidia-dali-cuda130 and nvidia-dali-cuda120" in row.reason


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("gpu")
def test_a_release_of_flash_attention_that_is_broken_is_told_beside_the_one_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"flash_attn.cute.interface": "broken: no cutlass", "flash_attn_interface": "not installed: pip install it"}
    monkeypatch.setattr(
        capabilities, "_load", lambda module, install: (None, found[module]) if module in found else (torch, "")
    )
    row = capabilities._flash_attention()
    assert row.on
    assert row.detail.startswith("flash-attn-2")
    assert row.reason == "flash-attn-4 is broken: no cutlass"


def test_the_releases_of_flash_attention_are_those_of_the_kernels() -> None:
    assert list(capabilities._FLASH_ATTENTION) == [release.name for release in FLASH_ATTENTION_RELEASES]


@pytest.mark.usefixtures("gpu")
def test_triton_is_off_where_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_compiler, "triton_refusal", lambda: "")
    assert capabilities._triton().on
    assert capabilities.torch_compile("cuda").on
    monkeypatch.setattr(triton_compiler, "triton_refusal", lambda: "no C compiler: install gcc")
    assert capabilities._triton().reason == "no C compiler: install gcc"
    assert capabilities.torch_compile("cuda").reason == "Triton is off: no C compiler: install gcc"


def test_nvdec_names_the_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert "libnvcuvid.so.1" in capabilities._nvdec().reason


def test_nvdec_tells_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    h264 = NvdecFormat("h264", "4:2:0", 8, 48, 16, 4096, 4096, 65536)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(capabilities.nvdec, "query_nvdec", lambda device: Nvdec((h264,)))
    assert capabilities._nvdec() == Capability("DALI decode, NVDEC", True, "8-bit 4:2:0: h264 up to 4096x4096")
    monkeypatch.setattr(capabilities.nvdec, "query_nvdec", lambda device: Nvdec(missing="the GPU has no NVDEC"))
    assert capabilities._nvdec() == Capability("DALI decode, NVDEC", False, reason="the GPU has no NVDEC")
