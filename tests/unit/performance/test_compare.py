"""`bench compare` finds figures that became worse, and refuses reports that are not comparable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mvd_scale.cli import cli
from mvd_scale.errors import UserError
from mvd_scale.performance.benchmarks.checkpointing import CheckpointReport
from mvd_scale.performance.benchmarks.data.data_loading import DataReport, LoaderSpeed
from mvd_scale.performance.benchmarks.data.evaluation import EvalReport, EvalSpeed
from mvd_scale.performance.benchmarks.data.manifest_size import Command, ManifestReport, Size, Start
from mvd_scale.performance.benchmarks.endurance import FIGURES, EnduranceReport
from mvd_scale.performance.benchmarks.methods import MethodsReport
from mvd_scale.performance.benchmarks.rank_growth import Cost, RanksReport
from mvd_scale.performance.benchmarks.scaling import GrowthReport, Point
from mvd_scale.performance.benchmarks.step import StepReport
from mvd_scale.performance.benchmarks.students import StudentsReport
from mvd_scale.performance.benchmarks.teacher_loading import LoadReport
from mvd_scale.performance.benchmarks.teachers import TeacherSpeed, TeachersReport
from mvd_scale.performance.compare import KINDS, compare_reports
from mvd_scale.performance.profiling.report import Operator, PartFigures, ProfileReport
from mvd_scale.performance.report import Machine, Report
from mvd_scale.performance.roofline.report import RateRow, RooflineReport, RooflineRow

MACHINE = Machine("cpu", "A CPU", 2, 2, {"torch": "2.9.0"})
STEP = StepReport(
    machine=MACHINE,
    recipe="distill/b_from_b",
    overrides=[],
    precision="fp32",
    teacher_sharding="auto",
    ranks=1,
    clips_per_step=2,
    steps=2,
    milliseconds={"data wait": 2.0, "backward": 900.0, "loss and rest": 98.0},
    milliseconds_per_step=1000.0,
    clips_per_second=2.0,
    peak_memory_gib=5.0,
)
STUDENTS = StudentsReport(
    machine=MACHINE,
    recipe="distill/sb_from_b",
    overrides=[],
    precision="fp32",
    ranks=1,
    clips_per_step=2,
    rounds=3,
    together=4.0,
    alone={"s": 2.0, "b": 4.0},
)
DATA = DataReport(
    machine=MACHINE,
    figures=[LoaderSpeed("h264", "files", 0, "mvd-scale", 40, 0.1), LoaderSpeed("h264", "files", 0, "decord", 20, 0.2)],
    stages=[],
    absent={},
    rounds=3,
    seconds=1.0,
    source=None,
)
EVAL = EvalReport(
    machine=MACHINE,
    figures=[EvalSpeed("data", "mvd-scale", 6.0, 0.2, 300)],
    source=None,
    size="none",
    videos=12,
    workers=2,
    precision="int8",
    plain_precision="fp32",
    views="5 x 3 dense views",
    reader="PyAV",
)
LOAD = LoadReport(
    machine=MACHINE,
    size="S",
    precision="fp32",
    ranks=2,
    parameters=10,
    seconds=3.0,
    one_copy=100.0,
    largest_layer=10.0,
    share=50.0,
    held_after_loading=[50.0, 50.0],
    peak_per_rank=[60.0, 60.0],
    peak_of_all_ranks=110.0,
    peak_over_one_copy=1.1,
)
TEACHERS = TeachersReport(
    machine=MACHINE,
    recipe="distill/b_from_b",
    overrides=[],
    weights="random",
    figures=[TeacherSpeed("image", "bf16", 20.0, 0.9999, 0.003, 0.0001)],
    absent={},
)
PROFILE = ProfileReport(
    machine=MACHINE,
    recipe="distill/b_from_b",
    overrides=[],
    precision="fp32",
    teacher_sharding="auto",
    ranks=1,
    clips_per_step=2,
    steps=2,
    milliseconds_per_step=1000.0,
    profiled_milliseconds_per_step=1100.0,
    clips_per_second=2.0,
    parts={"backward": PartFigures(900.0, None, 10)},
    flops_per_step=10,
    peak_flops_per_second=100.0,
    peak_source="a data sheet",
    utilisation=0.5,
    data_wait_share=0.02,
    communication_milliseconds=0.0,
    collectives=[],
    operators=[Operator("aten::mm", 4, 30.0)],
    peak_memory_gib=5.0,
    highest_tensors_gib=2.0,
    highest_in="backward",
    losses=[1.0],
)
GROWTH = GrowthReport(
    machine=MACHINE,
    recipe="distill/b_from_b",
    overrides=[],
    precision="fp32",
    steps=2,
    base={"tokens": 196, "frames": 16, "batch": 1, "depth": 12},
    points={"batch": [Point(1, 2.0, 1.0), Point(2, 4.0, 1.5)]},
)
RANKS = RanksReport(
    machine=MACHINE,
    target=4096,
    microseconds_per_request=12.0,
    costs=[Cost("save", "requests", {16: 102.0, 64: 390.0}), Cost("drawing", "s", {16: 0.1, 64: 0.1})],
)
CHECKPOINT = CheckpointReport(
    machine=MACHINE,
    size="S",
    deepspeed="zero2",
    precision="fp32",
    ranks=2,
    parameters=10,
    gib=0.3,
    waiting=[0.1, 0.2],
    durable=[1.0, 2.0],
    resuming=1.5,
)
ENDURANCE = EnduranceReport(
    machine=MACHINE,
    recipe="quickstart/video_teacher",
    overrides=[],
    ranks=2,
    saves=2,
    steps=[1, 2, 3, 4],
    samples={name: [5.0, 6.0, 6.0, 7.0] for name in FIGURES},
    step_seconds=0.1,
    watching={"phases": 1e-5},
)
MANIFEST = ManifestReport(
    machine=MACHINE,
    starts=[Start(rows, "later", 2, 1.0, 300.0, 70.0) for rows in (1000, 10_000_000)],
    sizes=[Size(rows, rows / 2**20, rows / 2**18) for rows in (1000, 10_000_000)],
    commands=[Command(rows, "stats", 1.0, 100.0, 70.0, 0.0) for rows in (1000, 10_000_000)],
)
ROOFLINE = RooflineReport(
    machine=MACHINE,
    recipe="distill/b_from_b",
    overrides=[],
    precision="bf16",
    teacher_precision="bf16",
    teacher_sharding="auto",
    ranks=1,
    clips_per_step=4,
    milliseconds_per_step=1000.0,
    profiled_milliseconds=1010.0,
    limit_milliseconds=400.0,
    share=0.4,
    shares=[0.39, 0.4, 0.45],
    rows=[
        RooflineRow("encoder", "backward", "products", 60e9, 300.0, 600.0),
        RooflineRow("data wait", "", "rest", 0, 0.0, 250.0),
        RooflineRow("optimizer", "", "memory", 2e9, 60.0, 157.0),
        RooflineRow("encoder", "forward", "products", 10e9, 40.0, 3.0),
    ],
    rates=[
        RateRow("a product", "G W", "products", 1e9, 5.0, 12),
        RateRow("a smaller one", "G W", "products", 1.5e8, 1.0, 4),
        RateRow("a copy", "copy_", "memory", 1e8, 5.0, 20),
    ],
)
REPORTS: dict[str, Report] = {
    "step": STEP,
    "methods": MethodsReport(machine=MACHINE, steps={"co-teaching": STEP}),
    "data": DATA,
    "eval": EVAL,
    "load": LOAD,
    "growth": GROWTH,
    "ranks": RANKS,
    "checkpoint": CHECKPOINT,
    "endurance": ENDURANCE,
    "manifest": MANIFEST,
    "teachers": TEACHERS,
    "students": STUDENTS,
    "profile": PROFILE,
    "roofline": ROOFLINE,
}


def compare(folder: Path, old: Report, new: Report, *words: str) -> Result:
    for name, report in (("old.json", old), ("new.json", new)):
        (folder / name).write_text(report.to_json())
    return CliRunner().invoke(cli, ["bench", "compare", str(folder / "old.json"), str(folder / "new.json"), *words])


def refusal(folder: Path, old: Report, new: Report) -> str:
    (folder / "old.json").write_text(old.to_json())
    (folder / "new.json").write_text(new.to_json())
    with pytest.raises(UserError) as error:
        compare_reports(folder / "old.json", folder / "new.json", 0.05)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_report_equals_itself(tmp_path, kind):
    result = compare(tmp_path, REPORTS[kind], REPORTS[kind])
    assert result.exit_code == 0, result.output
    assert "1.000" in result.output
    assert "WORSE" not in result.output


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"milliseconds_per_step": 1049.0}, 0),
        ({"milliseconds_per_step": 1051.0}, 1),
        ({"milliseconds_per_step": 500.0, "clips_per_second": 4.0}, 0),
        ({"clips_per_second": 1.8}, 1),
        ({"peak_memory_gib": 5.5}, 1),
        ({"milliseconds": {"data wait": 2.0, "backward": 950.0, "loss and rest": 98.0}}, 1),
    ],
)
def test_slower_or_larger_beyond_the_tolerance_is_exit_code_1(tmp_path, changes: dict[str, Any], code):
    result = compare(tmp_path, STEP, replace(STEP, **changes))
    assert result.exit_code == code, result.output
    assert ("WORSE" in result.output) == bool(code)


def test_the_tolerance_is_a_choice(tmp_path):
    assert compare(tmp_path, STEP, replace(STEP, peak_memory_gib=5.5), "--tolerance", "0.2").exit_code == 0


def test_a_part_too_short_to_measure_counts_only_once_it_has_grown(tmp_path):
    def waiting(milliseconds: float) -> StepReport:
        return replace(STEP, milliseconds={**STEP.milliseconds, "data wait": milliseconds})

    assert compare(tmp_path, STEP, waiting(4.0)).exit_code == 0
    assert compare(tmp_path, STEP, waiting(40.0)).exit_code == 1


@pytest.mark.parametrize(("way", "code"), [("mvd-scale", 1), ("decord", 0)])
def test_only_our_own_speed_is_judged(tmp_path, way, code):
    slower = [replace(f, clips_per_second=f.clips_per_second / 2) if f.way == way else f for f in DATA.figures]
    assert compare(tmp_path, DATA, replace(DATA, figures=slower)).exit_code == code


@pytest.mark.parametrize(("utilisation", "code"), [(0.6, 0), (0.4, 1)])
def test_a_lower_utilisation_is_worse(tmp_path, utilisation, code):
    assert compare(tmp_path, PROFILE, replace(PROFILE, utilisation=utilisation)).exit_code == code


def test_a_zero_that_stays_is_no_change(tmp_path):
    idle = replace(STEP, milliseconds={**STEP.milliseconds, "data wait": 0.0})
    assert compare(tmp_path, idle, idle).exit_code == 0


def test_other_versions_are_shown_and_compared(tmp_path):
    newer = replace(STEP, machine=replace(MACHINE, versions={"torch": "2.14.1"}))
    result = compare(tmp_path, STEP, newer)
    assert result.exit_code == 0
    assert "versions differ: torch 2.9.0 and 2.14.1" in result.output


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (LOAD, "`bench step`, "),
        (replace(STEP, recipe="distill/l_from_l"), "recipe distill/b_from_b and distill/l_from_l"),
        (replace(STEP, overrides=["--model.depth", "2"]), "overrides [] and ['--model.depth', '2']"),
        (replace(STEP, clips_per_step=4), "clips_per_step 2 and 4"),
        (replace(STEP, machine=replace(MACHINE, device="NVIDIA H100")), "device cpu and NVIDIA H100"),
        (replace(STEP, machine=replace(MACHINE, cores=8)), "cores 2 and 8"),
        (replace(STEP, milliseconds={"backward": 900.0}), "data wait, ms is in only one of them"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, new, said):
    assert said in refusal(tmp_path, STEP, new)


@pytest.mark.parametrize("report", [DATA, EVAL])
def test_other_videos_are_another_measurement(tmp_path, report):
    assert "source None and k400.parquet" in refusal(tmp_path, report, replace(report, source="k400.parquet"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "is not JSON"),
        ("[1]", "kind is None"),
        (json.dumps({"kind": "race"}), "kind is 'race', expected step, methods"),
        (json.dumps({"kind": "load", "size": "S"}), "is not a complete report of `bench load`: machine"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text, said):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError) as error:
        compare_reports(tmp_path / "report.json", tmp_path / "report.json", 0.05)
    assert said in str(error.value)


def test_costs_are_extrapolated_by_their_powers():
    linear, constant = RANKS.costs
    assert linear.power == pytest.approx(0.967, abs=1e-3)
    assert linear.at(4096) == pytest.approx(390 * 64**linear.power)
    assert linear.is_linear
    assert constant.at(4096) == pytest.approx(0.1)
    assert not Cost("barrier", "keys", {16: 256.0, 64: 4096.0}).is_linear
    assert "0.97      21,800" in RANKS.to_text()


def test_growth_in_a_long_run_is_that_of_its_second_half():
    grown = replace(ENDURANCE, steps=[100, 200, 300, 400], samples={"memory": [1.0, 5.0, 10.0, 11.0]})
    assert grown.growth("memory") == pytest.approx(10.0)


def test_the_share_of_the_watching_is_told():
    assert "watching takes 0.010% of a step of 100 ms" in ENDURANCE.to_text()


def test_students_together_are_compared_with_their_runs_one_after_the_other() -> None:
    assert STUDENTS.speedup == 1.5
    text = STUDENTS.to_text()
    assert "one after the other                 6000     0.333" in text
    assert "takes 0.667 of the time of 2 runs: 1.50 times as fast" in text
