"""Registers, shared memory and spills of the kernels do not grow; compiled here, without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import triton

pytest.importorskip("mvd_kernels.compile_report", reason="it needs Triton 3.6", exc_type=ImportError)

from mvd_kernels.compile_report import as_json, measure, measure_all
from mvd_kernels.triton_ops.example_inputs import example_launches

GOLDEN = Path(__file__).with_name("compile_report.json")


@pytest.mark.slow
def test_every_kernel_takes_what_it_took() -> None:
    golden = json.loads(GOLDEN.read_text())
    if golden["triton"] != triton.__version__:
        pytest.skip(f"compile_report.json is of Triton {golden['triton']}; {triton.__version__} compiles otherwise")
    measured = json.loads(as_json(measure_all()))["kernels"]
    changed = [
        f"{name}: {golden['kernels'].get(name)} -> {measured.get(name)}"
        for name in sorted(golden["kernels"].keys() | measured.keys())
        if golden["kernels"].get(name) != measured.get(name)
    ]
    assert not changed, (
        "Kernels compile to something else. If that is meant, say why in the commit and write the file anew:\n"
        "python -m mvd_kernels.compile_report --json > tests/kernels/compile_report.json\n" + "\n".join(changed)
    )


def test_nothing_is_spilled_anywhere() -> None:
    golden = json.loads(GOLDEN.read_text())["kernels"]
    assert {name.rsplit(" ", 1)[1] for name in golden} == {"sm_80", "sm_90", "sm_100"}
    assert not [name for name, taken in golden.items() if taken["spilled"]]


def test_a_spill_is_seen() -> None:
    example = next(s for s in example_launches() if s.launch.kernel.__name__ == "add_layer_norm_backward")
    cramped = replace(example, launch=replace(example.launch, warps=1))
    assert measure(example, 90).spilled == 0
    assert measure(cramped, 90).spilled > 0
