"""`bench step --roofline` on a real step: times add up to it, and the work is the planner's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvd_scale.performance.bench_setup import bench_recipe
from mvd_scale.performance.planning.flops import part_flops
from mvd_scale.performance.planning.workload import build_workload

from .conftest import Jobs

pytestmark = pytest.mark.distributed


def test_the_roofline_of_a_step_adds_up(jobs: Jobs, clips: Path) -> None:
    words = ["--model.depth", "2", "--training.micro_batch", "1", "--data.source", str(clips)]
    command = [
        "bench",
        "step",
        "--roofline",
        "--recipe",
        "quickstart/student",
        "--batch",
        "2",
        "--steps",
        "1",
        "--json",
    ]
    code, output = jobs.run(*command, *words)
    assert code == 0, output
    report = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    rows = report["rows"]
    assert sum(row["milliseconds"] for row in rows) == pytest.approx(report["profiled_milliseconds"], rel=1e-6)
    assert sum(row["limit_milliseconds"] for row in rows) == pytest.approx(report["limit_milliseconds"], rel=1e-6)
    assert report["share"] == pytest.approx(report["limit_milliseconds"] / report["milliseconds_per_step"])
    assert report["shares"] == [report["share"]]

    workload = build_workload(bench_recipe("quickstart/student", words, "fp32", 2))
    said = 2 * sum(part.total for part in part_flops(workload, checkpointing="none"))
    assert sum(row["work"] for row in rows if row["kind"] != "memory") == pytest.approx(said)

    # Every part that has work was measured, in both passes.
    spent = {(row["part"], row["passes"], row["kind"]): row["milliseconds"] for row in rows}
    for part, passes in (
        *((f"{name} teacher", ("forward",)) for name in ("image", "video")),
        *((name, ("forward", "backward")) for name in ("encoder", "image decoder", "video decoder")),
    ):
        for each in passes:
            for kind in ("products", "attention", "memory"):
                assert spent[part, each, kind] > 0
    assert spent["optimizer", "", "memory"] > 0
    assert spent["loss and rest", "backward", "memory"] > 0
