"""Benchmarks print the documented figures; the speed is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Jobs

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_the_parts_of_a_step_add_up(jobs: Jobs, clips: Path) -> None:
    arguments = ["--recipe", "quickstart/student", "--data.source", clips, "--training.micro_batch", "1"]
    code, output = jobs.run("bench", "step", *arguments, "--batch", "2", "--steps", "1", "--json")
    assert code == 0, output
    report = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    parts = report["milliseconds"]
    assert {"data wait", "image teacher", "video teacher", "student forward", "backward", "optimizer"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(report["milliseconds_per_step"], rel=1e-6)
    assert report["clips_per_second"] == pytest.approx(2000 / report["milliseconds_per_step"], rel=1e-6)


def test_points_of_growth_have_times_and_peaks_of_their_own(jobs: Jobs, clips: Path) -> None:
    others = ["--sides", "none", "--frames", "none", "--depths", "none"]
    arguments = ["--recipe", "quickstart/student", "--data.source", clips, "--batches", "1,8", "--steps", "1"]
    code, output = jobs.run("bench", "growth", *arguments, *others, "--json")
    assert code == 0, output
    report = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    one, eight = report["points"]["batch"]
    assert (one["count"], eight["count"]) == (1, 8)
    assert 0 < one["seconds"] < eight["seconds"]
    assert 0 < one["gib"] < eight["gib"] < 2


def test_no_rank_holds_more_than_its_share_of_a_loaded_teacher(jobs: Jobs) -> None:
    code, output = jobs.run("bench", "load", "--size", "S", "--json", ranks=2)
    assert code == 0, output
    report = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    assert len(report["held_after_loading"]) == 2
    for held in report["held_after_loading"]:
        assert held <= report["share"] + report["largest_layer"]


def test_teachers_in_every_precision_stand_beside_their_fidelity(jobs: Jobs, clips: Path) -> None:
    arguments = ["--recipe", "quickstart/student", "--data.source", clips, "--device", "cpu"]
    code, output = jobs.run("bench", "teachers", *arguments, "--steps", "1", "--json")
    assert code == 0, output
    figures = json.loads(output[output.index("{\n") : output.rindex("}") + 1])["figures"]
    assert [(figure["target"], figure["precision"]) for figure in figures] == [
        (target, precision) for target in ("image", "video") for precision in ("fp32", "bf16", "int8")
    ]
    for figure in figures:
        exact = figure["precision"] == "fp32"
        assert figure["cosine"] == pytest.approx(1, abs=1e-6 if exact else 1e-3)
        assert (figure["loss_change"] == figure["relative_error"] == 0) == exact
    code, output = jobs.run("bench", "teachers", "--recipe", "pretrain/videomae_b_k400", "--device", "cpu")
    assert code == 2, output
    assert "has no frozen teacher" in output


def test_8_bit_teachers_train_and_are_part_of_the_run(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", "quickstart/student", "--data.source", clips, "--training.micro_batch", "1"]
    eight = ["--teachers.precision", "int8", "--teachers.sharding", "replicated"]
    code, output = jobs.run("bench", "step", *arguments, "--batch", "2", "--steps", "1", *eight)
    assert code == 0, output
    assert "image teacher" in output


def test_a_checkpoint_is_timed_from_its_begin_to_the_disk_and_back(jobs: Jobs, tmp_path: Path) -> None:
    arguments = ["--size", "S", "--device", "cpu", "--saves", "2", "--work", tmp_path]
    code, output = jobs.run("bench", "checkpoint", *arguments, "--json", ranks=2)
    assert code == 0, output
    report = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    assert report["gib"] == pytest.approx(12 * report["parameters"] / 2**30, rel=0.02)
    assert len(report["waiting"]) == len(report["durable"]) == 2
    assert all(0 < waits < durable for waits, durable in zip(report["waiting"], report["durable"], strict=True))
    assert report["resuming"] > 0
    assert not any(tmp_path.iterdir())


def test_a_long_run_is_sampled_beside_its_saves(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    arguments = ["--steps", "8", "--saves", "2", "--data.source", clips, "--png", tmp_path / "plot.png"]
    code, output = jobs.run("bench", "endurance", *arguments, "--json", ranks=2)
    assert code == 0, output
    report = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    assert report["steps"] == list(range(1, 9))
    assert all(len(values) == 8 and min(values) > 0 for values in report["samples"].values())
    assert {"phases", "request to stop", "events", "heartbeats"} == report["watching"].keys()
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_costs_of_a_large_job_are_fitted_and_extrapolated(jobs: Jobs) -> None:
    code, output = jobs.run("bench", "ranks", "--ranks", "2,4", "--target", "64")
    assert code == 0, output
    assert "step: request to stop, requests" in output
    assert "at 64" in output
