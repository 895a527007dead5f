"""Tests of steps that are not finite: skipped a number of times, recorded with their clips, then an error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.health.verdict import Member
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import SharedError
from mvd_scale.training.nonfinite import NonfiniteSteps
from mvd_scale.utils.events import read_events

ROWS = torch.tensor([2, 0])


def steps_of(precision: str, skip: int, *, folder: Path | None = None) -> NonfiniteSteps:
    recipe: Any = SimpleNamespace(training=SimpleNamespace(precision=precision, skip_nonfinite_steps=skip))
    steps = NonfiniteSteps(recipe, Ranks(0, 0, 2, torch.device("cpu")))
    if folder is not None:
        steps.folder = SimpleNamespace(manifest=folder / "manifest.parquet", events=folder / "events.jsonl")  # type: ignore[assignment]
    return steps


def member(rank: int) -> Member:
    return Member(rank, f"node-{rank}", 70 + rank)


def run(steps: NonfiniteSteps, engine: Any, step: int, loss: float, *, skipped: bool) -> None:
    steps.begin(engine)
    engine.skipped_steps += skipped
    steps.check(engine, step, [(torch.tensor(loss), ROWS)])


@pytest.fixture
def other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1, whose loss of rows 5 and 6 is finite."""

    def gather(parts: list[Any], mine: Any) -> None:
        parts[:] = [(member(0), *mine[1:]), (member(1), [True], [[5, 6]], True)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    manifest = SimpleNamespace(path=[f"{row}.mp4" for row in range(9)])
    monkeypatch.setattr(Manifest, "load", lambda file: manifest)


@pytest.mark.usefixtures("other_rank")
def test_some_steps_are_skipped_and_the_next_one_is_an_error() -> None:
    steps, engine = steps_of("bf16", 2), SimpleNamespace(skipped_steps=4, module=torch.nn.Linear(2, 1))
    run(steps, engine, 7, float("nan"), skipped=True)
    run(steps, engine, 8, float("nan"), skipped=True)
    named = (
        r"rank 0 \(host node-0, pid 70\) are not finite in 'forward' of step 10, nor were those of the 2 steps before"
    )
    with pytest.raises(SharedError, match=named) as caught:
        run(steps, engine, 9, float("nan"), skipped=True)
    assert caught.value.ranks == (0,)


@pytest.mark.usefixtures("other_rank")
def test_gradients_that_no_loss_explains_are_of_no_known_rank() -> None:
    steps, engine = steps_of("bf16", 0), SimpleNamespace(skipped_steps=0, module=torch.nn.Linear(2, 1))
    with pytest.raises(SharedError, match=r"are not finite in 'backward' of step 10, though .*; the weights") as caught:
        run(steps, engine, 9, 1.0, skipped=True)
    assert caught.value.ranks == ()


@pytest.mark.usefixtures("other_rank")
def test_gradients_that_stay_so_are_of_the_rank_on_which_they_arise(tmp_path: Path) -> None:
    steps = steps_of("bf16", 1, folder=tmp_path)
    engine = SimpleNamespace(skipped_steps=0, module=torch.nn.Linear(2, 1))

    def step(number: int, factor: float) -> None:
        steps.begin(engine)
        (engine.module(torch.ones(1, 2)).sum() * factor).backward()
        engine.skipped_steps += factor != 1
        steps.check(engine, number, [(torch.tensor(1.0), ROWS)])

    step(7, float("nan"))
    step(8, 1.0)
    assert not engine.module.weight._backward_hooks, "they cost time"
    step(9, float("nan"))
    named = r"the gradients of rank 0 \(host node-0, pid 70\) are not finite in 'backward' of step 11, nor"
    with pytest.raises(SharedError, match=named) as caught:
        step(10, float("nan"))
    assert caught.value.ranks == (0,)
    first, again, last = read_events(tmp_path / "events.jsonl")
    assert (first["ranks"], again["ranks"], last["ranks"]) == ([], [], [0])
    assert last["rows"] == [2, 0]


@pytest.mark.usefixtures("other_rank")
def test_a_finite_step_begins_the_count_anew() -> None:
    steps, engine = steps_of("fp32", 1), SimpleNamespace(skipped_steps=0, module=torch.nn.Linear(2, 1))
    for step in range(6):
        run(steps, engine, step, float("nan"), skipped=step % 2 == 0)
        assert steps.in_a_row == (step % 2 == 0)


def test_skipped_steps_of_fp16_are_no_error() -> None:
    steps, engine = steps_of("fp16", 0), SimpleNamespace(skipped_steps=0, module=torch.nn.Linear(2, 1))
    run(steps, engine, 1, float("nan"), skipped=True)
    assert steps.in_a_row == 0


@pytest.mark.usefixtures("other_rank")
def test_the_event_names_the_clips_of_the_loss_that_is_not_finite(tmp_path: Path) -> None:
    steps, engine = steps_of("fp32", 3, folder=tmp_path), SimpleNamespace(skipped_steps=0, module=torch.nn.Linear(2, 1))
    run(steps, engine, 7, float("nan"), skipped=True)
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event["step"], event["ranks"], event["clips"]) == (8, [0], ["2.mp4", "0.mp4"])


@pytest.mark.usefixtures("other_rank")
def test_the_event_names_all_clips_if_all_losses_are_finite(tmp_path: Path) -> None:
    steps, engine = steps_of("fp32", 3, folder=tmp_path), SimpleNamespace(skipped_steps=0, module=torch.nn.Linear(2, 1))
    run(steps, engine, 7, 1.0, skipped=True)
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event["ranks"], event["rows"]) == ([], [2, 0, 5, 6])
