"""Tests of what the checks of a bring-up conclude: each fault that they look for fails them."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvd_scale.performance.batches import random_batch
from mvd_scale.performance.bringup.checks import blocks, machine, rank_group, steps, zero
from mvd_scale.performance.bringup.checks.comparisons import gradient_errors, relative
from mvd_scale.performance.bringup.checks.rank_group import RankFailed, RankGroup
from mvd_scale.performance.bringup.checks.steps import StepCase, counted_syncs, plan_of, sdpa_alone
from mvd_scale.performance.bringup.checks.zero import judge_losses, judge_overflow, judge_sum, judge_teachers
from mvd_scale.performance.bringup.session import Check, CheckFailed, LeftOut

OVERFLOW = {
    "scales": [65536, 65536, 32768, 16384],
    "skipped": 3,
    "moved by overflows": False,
    "moves afterwards": True,
    "loss afterwards": 1.5,
}
TEACHER = {"cosine": 0.99999, "error": 1e-3, "held": 510, "whole": 1000}
LOSSES = [1.0, 0.9, 0.8]


@pytest.fixture
def check() -> Check:
    return Check({})


def test_sound_ranks_pass(check: Check) -> None:
    judge_sum(check, [3.0, 3.0])
    judge_losses(check, [LOSSES, LOSSES], LOSSES, 1e-4)
    judge_overflow(check, [OVERFLOW, {**OVERFLOW, "scales": [65536, 32768, 16384, 8192]}])
    judge_teachers(check, [{"image": TEACHER}] * 2)
    assert check.figures["loss scales"] == "65536 32768 16384 8192"
    assert check.figures["image: share at rest"] == 0.51


@pytest.mark.parametrize(
    ("judge", "results", "promise"),
    [
        (judge_sum, [3.0, 2.0], "the sum on every rank is 3"),
        (judge_overflow, [{**OVERFLOW, "skipped": 2}], "3 steps are skipped"),
        (judge_overflow, [{**OVERFLOW, "moved by overflows": True}], "moves no weight"),
        (judge_overflow, [{**OVERFLOW, "scales": [65536, 131072, 65536, 32768]}], "halves the loss scale or keeps it"),
        (judge_overflow, [{**OVERFLOW, "scales": [65536, 65536, 65536, 32768]}], "later overflows halve"),
        (judge_overflow, [{**OVERFLOW, "moves afterwards": False}], "the next finite step moves"),
        (judge_overflow, [{**OVERFLOW, "loss afterwards": float("nan")}], "the loss is finite"),
        (judge_teachers, [{"image": {**TEACHER, "cosine": 0.99}}] * 2, "keep their direction"),
        (judge_teachers, [{"image": {**TEACHER, "error": 0.02}}] * 2, "within 1e-2"),
        (judge_teachers, [{"image": {**TEACHER, "held": 1000}}] * 2, "keeps its share of image only"),
    ],
)
def test_a_fault_of_a_rank_fails(check: Check, judge: Callable[..., None], results: Any, promise: str) -> None:
    with pytest.raises(CheckFailed, match=promise):
        judge(check, results)


@pytest.mark.parametrize(
    ("results", "reference", "promise"),
    [
        ([LOSSES, [1.0, 0.9, 0.81]], LOSSES, "within 0.0001"),
        ([LOSSES, [1.0, 0.9, float("nan")]], LOSSES, "within 0.0001"),
        ([[1.0, 1.0]], [1.0, 1.0], "the reference learns"),
    ],
)
def test_losses_that_differ_or_do_not_fall_fail(check: Check, results: Any, reference: Any, promise: str) -> None:
    with pytest.raises(CheckFailed, match=promise):
        judge_losses(check, results, reference, 1e-4)


def test_gradients_and_outputs_are_compared() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    inputs = torch.randn(5, 4)

    def call(model: nn.Module) -> dict[str, Tensor]:
        return {"outputs": model(inputs)}

    assert gradient_errors(copy.deepcopy(plain), plain, call) == {"outputs": 0, "gradients": 0}
    plain.zero_grad()
    moved = copy.deepcopy(plain)
    with torch.no_grad():
        moved[2].bias.add_(1)
    errors = gradient_errors(moved, plain, call)
    assert min(errors.values()) > 0.1
    assert relative(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_an_update_that_is_dropped_in_part_fails(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    blocks.drops(check, device, compiles=False)
    monkeypatch.setattr(blocks.DropPath, "forward", lambda self, x: x * 4 / 3)
    with pytest.raises(CheckFailed, match="75% of the clips are kept"):
        blocks.drops(check, device, compiles=False)
    monkeypatch.setattr(blocks.DropPath, "forward", lambda self, x: x * (torch.rand_like(x) > 0.25) * 4 / 3)
    with pytest.raises(CheckFailed, match="a clip is dropped as a whole"):
        blocks.drops(check, device, compiles=False)


def test_synchronisations_are_counted_by_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with counted_syncs(torch.device("cuda")) as counted:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert modes == ["warn", "default"]
    ((place, count),) = counted.items()
    assert count == 3
    assert place.startswith("bringup/test_checks.py:")


def test_flash_attention_is_left_aside_for_a_while() -> None:
    module = import_module("mvd_kernels.attention")
    before = module.FLASH_ATTENTION_RELEASES
    with sdpa_alone():
        assert module.FLASH_ATTENTION_RELEASES == ()
    assert module.FLASH_ATTENTION_RELEASES is before


def test_the_plan_is_of_the_same_step() -> None:
    plan = plan_of(StepCase("distill/b_from_b", 16), "H100", "flash-attn-2")
    assert (plan.cluster.gpu.name, plan.cluster.gpus, plan.parallel.micro) == ("H100", 1, 16)
    assert plan.cluster.kernel == "flash-attn"
    assert plan.parallel.accumulation == 1
    assert plan_of(StepCase("distill/b_from_b", 16, sdpa=True), None, "flash-attn-2").cluster.kernel == "sdpa"


def test_a_step_that_does_not_fit_is_left_out_with_the_plan_s_reason(check: Check) -> None:
    setting: Any = type("Setting", (), {"device": torch.device("cpu"), "gpu": "V100"})()
    with pytest.raises(LeftOut, match="do not fit in the memory of one V100"):
        steps.measure(check, StepCase("distill/h_from_h", 64), setting)


def test_random_batches_have_the_recipe_s_shapes_and_masks() -> None:
    recipe = StepCase("quickstart/student", 3, "fp32").load()
    batch = random_batch(recipe, 3, torch.device("cpu"), sides=(32,))
    assert batch.pixels.shape == (3, 4, 64, 64, 3)
    assert batch.at(32).shape == (3, 4, 32, 32, 3)
    tokens = torch.cat([batch.visible, batch.masked], 1).sort(1).values
    assert torch.equal(tokens, torch.arange(128).expand(3, -1))
    assert not torch.equal(batch.masked[0], batch.masked[1])


PROGRAM = """
import json, sys, time
folder, *jobs = sys.argv[2:]
import os
rank = int(os.environ["RANK"])
with open(f"{folder}/rank{rank}.jsonl", "a") as file:
    for job in jobs:
        if job == "fatal" and rank == 1:
            sys.exit(7)
        if job == "endless":
            file.write('{"job": "end')
            file.flush()
            time.sleep(600)
        file.write(json.dumps({"job": job, "result": rank}) + chr(10))
        file.flush()
"""


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RankGroup]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folder = tmp_path / "ranks"
    folder.mkdir()
    monkeypatch.setattr(rank_group, "PROGRAM", [sys.executable, str(program)])
    return lambda *jobs: RankGroup("cpu", 2, folder, jobs)


def test_results_of_ranks_come_job_by_job(group: Callable[..., RankGroup]) -> None:
    with group("one", "two", "endless") as ranks:
        assert ranks.wait_for("two") == [0, 1]
        assert ranks.wait_for("one") == [0, 1]
        assert not ranks.broken


def test_a_rank_that_ends_is_named(group: Callable[..., RankGroup]) -> None:
    with group("one", "fatal", "two") as ranks:
        assert ranks.wait_for("one") == [0, 1]
        with pytest.raises(RankFailed, match="rank 1 ended with code 7 before it had done 'fatal'"):
            ranks.wait_for("fatal")
        assert ranks.broken


def test_ranks_that_end_are_started_again_for_the_other_jobs(
    group: Callable[..., RankGroup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = ["sum over ranks", "fatal", "sharded teachers"]
    monkeypatch.setattr(zero, "jobs_of", lambda device: jobs)
    monkeypatch.setattr(zero, "judge", lambda *_: None)
    outcomes: dict[str, str] = {}

    class Recorder:
        device, folder = "cpu", tmp_path

        def made(self, name: str) -> bool:
            return False

        def check(self, name: str, work: Callable[[Check], None], *_: float) -> None:
            try:
                work(Check({}))
                outcomes[name] = "passed"
            except RankFailed:
                outcomes[name] = "failed"

    session: Any = Recorder()
    zero.run(session)
    assert outcomes == {
        "sum over ranks, 2 ranks": "passed", "fatal, 2 ranks": "failed", "sharded teachers, 2 ranks": "passed",
    }  # fmt: skip


class Names:
    """A session that makes no checks."""

    device = "cuda"

    def __init__(self) -> None:
        self.names: list[str] = []

    def check(
        self, name: str, work: Callable[[Check], None], seconds: float = 10.0, limit: float | None = None
    ) -> bool:
        self.names.append(name)
        return False


def test_what_is_there_is_told_where_torch_finds_no_gpu(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    session: Any = Names()
    machine.run(session)
    assert session.names[:2] == ["GPU", "machine"]
    with pytest.raises(CheckFailed):
        machine.no_gpu(check)
    assert check.figures["driver"]
