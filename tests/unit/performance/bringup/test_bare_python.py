"""Tests of the bring-up on a Python with few packages: stages run with what they name, the others are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.performance.bringup.stages import STAGES

from .conftest import ROOT, BarePython

SCRIPT = ROOT / "launch" / "gpu_bringup.sh"

DEEPSPEED = (
    "deepspeed", "hjson", "einops", "msgpack", "tqdm", "cpuinfo", "ninja", "psutil", "pydantic", "pydantic_core",
    "annotated_types", "typing_inspection", "yaml", "_yaml", "safetensors", "rich", "timm", "torchvision",
    "torchvision.libs", "PIL", "pillow.libs", "huggingface_hub", "httpx",
)  # fmt: skip
"""Modules that stages (d) and (e) need beyond torch: neither DALI nor PyAV, nor pyarrow."""


def stages(out: Path) -> dict[str, dict[str, Any]]:
    return {stage["letter"]: stage for stage in json.loads((out / "bringup.json").read_text())["stages"]}


def faults(stage: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (check["name"], check["outcome"], check["details"])
        for check in stage["checks"]
        if check["outcome"] not in ("passed", "left out")
    ]


@pytest.mark.slow
def test_stages_a_to_c_need_torch_triton_and_numpy_alone(bare_python: BarePython, tmp_path: Path) -> None:
    # Without compilation, which takes minutes here and is no matter of packages.
    result = bare_python(SCRIPT, "--device", "cpu", "--minutes", "30", "--out", "out", TORCHDYNAMO_DISABLE="1")
    found = stages(tmp_path / "out")
    for letter in "abc":
        assert found[letter]["outcome"] == "done", found[letter]
        assert not faults(found[letter])
        assert any(check["outcome"] == "passed" for check in found[letter]["checks"])
    for letter, missing in (("d", "pydantic"), ("e", "deepspeed"), ("f", "nvidia.dali"), ("g", "av")):
        assert found[letter]["outcome"] == "left out"
        assert missing in found[letter]["reason"]
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_stages_d_and_e_need_neither_dali_nor_pyav(bare_python: BarePython, tmp_path: Path) -> None:
    words = ("--device", "cpu", "--minutes", "30", "--out", "out", "--stages", "de")
    bare_python(SCRIPT, *words, modules=DEEPSPEED, TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")
    found = stages(tmp_path / "out")
    for letter in "de":
        assert found[letter]["outcome"] == "done", found[letter]
        assert not faults(found[letter])
    assert {check["name"] for check in found["d"]["checks"]} == {
        "sum over ranks, 2 ranks", *(f"fp32, {stage}, 2 ranks" for stage in ("zero1", "zero2", "zero3")),
    }  # fmt: skip
    first = found["e"]["checks"][0]["figures"]
    assert {"clips/s", "TFLOP/s", "share of products", "peak, GiB", "waits of the host"} <= first.keys()


def test_the_runner_needs_the_standard_library_alone(bare_python: BarePython) -> None:
    program = (
        "import sys; import mvd_scale.performance.bringup.__main__, mvd_scale.performance.bringup.worker;"
        "print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    result = bare_python("python", "-c", program, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}")
    assert set(result.stdout.split()) <= {"mvd_scale", "__main__", "_virtualenv"}, result.stderr


def test_every_stage_has_a_module_that_runs() -> None:
    for stage in STAGES:
        module = ROOT.joinpath(*stage.module.split(".")).with_suffix(".py")
        assert "def run(session: Session) -> None:" in module.read_text()
