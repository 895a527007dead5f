"""The benchmark of an operator runs on the machine of the tests, and its table names the device."""

from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mvd_kernels.bench import limits, timing
from mvd_kernels.bench.__main__ import OPERATORS, main
from mvd_kernels.bench.case import BenchmarkCase


def test_the_table_names_device_and_versions(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    result = CliRunner().invoke(main, ["tube_rows", "--csv", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    with file.open() as table:
        lines = list(csv.DictReader(table))
    assert {line["way"] for line in lines} == ({"reference", "triton"} if torch.cuda.is_available() else {"reference"})
    for line in lines:
        assert line["torch"] == torch.__version__
        assert line["device"] in result.output
        assert 0 < float(line["ms_20"]) <= float(line["ms_50"]) <= float(line["ms_80"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_cases_of_both_models(operator: str) -> None:
    cases = list(import_module(f"mvd_kernels.bench.{operator}").cases(torch.device("cpu")))
    assert {model for case in cases for model in case.shape.split(":")[0].split(", ")} == {"B", "L"}


def test_passes_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_host_times", lambda run: (run(), (1.0, 2.0, 3.0))[1])
    leaf = torch.ones(3, requires_grad=True)
    seen = []

    def call() -> torch.Tensor:
        seen.append("forward")
        return 2 * leaf

    case = BenchmarkCase("", torch.float32, {"reference": call}, (leaf,))
    passes = [line.passes for line in timing.time_case(case, torch.device("cpu"))]
    assert passes == ["forward", "backward", "full"]
    assert len(seen) == 3  # once forward, once to have something to go back through, once full


def test_the_peak_of_a_cpu_is_measured_in_seconds_in_dtypes_that_it_computes_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(limits, "bf16_instructions", lambda: False)
    assert (limits.product_side(cpu, torch.float32), limits.product_side(cpu, torch.bfloat16)) == (2048, 512)
    monkeypatch.setattr(limits, "bf16_instructions", lambda: True)
    assert limits.product_side(cpu, torch.bfloat16) == 2048
    assert limits.product_side(torch.device("cuda"), torch.bfloat16) == 8192
