"""A sink that fails does not end a run, and is tried again; each run has the sinks that its recipe asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.metrics.sink import MetricSink, Values
from mvd_scale.training.metrics.writer import MetricWriter, check_sinks, metric_writer
from mvd_scale.utils.io import read_metrics


class Recorder(MetricSink):
    """Sink that fails while it is told to."""

    name = "recorder"

    def __init__(self) -> None:
        self.broken = False
        self.steps: list[int] = []
        self.ended: bool | None = None

    def open(self) -> None:
        if self.broken:
            raise RuntimeError("no space left")

    def write(self, step: int, values: Values) -> None:
        if self.broken:
            raise RuntimeError("no space left")
        self.steps.append(step)

    def close(self, *, failed: bool) -> None:
        self.ended = failed


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart/video_teacher", ["--run.folder", str(folder), *overrides])


def ranks(rank: int = 0) -> Ranks:
    return Ranks(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu"))


def write(recipe: Recipe, start: int, steps: range, values: Values, rank: int = 0) -> RunFolder:
    folder = RunFolder(recipe.run.folder)
    folder.path.mkdir(exist_ok=True)
    with metric_writer(folder, recipe, ranks(rank), start_step=start, total_steps=9) as writer:
        for step in steps:
            writer.write(step, values)
    return folder


def test_a_failing_sink_is_one_warning_and_is_tried_again(values: Values, logged: list[str]) -> None:
    first, second = Recorder(), Recorder()
    with MetricWriter([first, second]) as writer:
        for step, broken in enumerate([False, True, True, False]):
            first.broken = broken
            writer.write(step, values)
    assert (first.steps, second.steps) == ([0, 3], [0, 1, 2, 3])
    assert logged == [
        "WARNING recorder cannot be written: no space left; the run goes on without",
        "INFO recorder is written again",
    ]
    assert first.ended is False


def test_a_sink_that_cannot_begin_does_not_keep_a_run_from_starting(values: Values, logged: list[str]) -> None:
    sink = Recorder()
    sink.broken = True
    with MetricWriter([sink]) as writer:
        sink.broken = False
        writer.write(1, values)
    assert sink.steps == [1]
    assert len(logged) == 2


def test_sinks_learn_that_a_run_failed() -> None:
    sink = Recorder()
    with pytest.raises(ValueError, match="boom"), MetricWriter([sink]):
        raise ValueError("boom")
    assert sink.ended is True


def test_a_lease_that_was_lost_ends_the_run_before_anything_is_written(values: Values) -> None:
    sink = Recorder()

    def lost() -> None:
        raise UserError("taken over")

    with MetricWriter([sink], lost) as writer, pytest.raises(UserError, match="taken over"):
        writer.write(1, values)
    assert sink.steps == []


def test_a_resumed_run_writes_each_step_once(tmp_path: Path, values: Values) -> None:
    recipe = recipe_of(tmp_path / "run", "--logging.tensorboard", "false")
    folder = write(recipe, 0, range(1, 6), values)
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "los')
    write(recipe, 3, range(4, 10), values)
    readings = read_metrics(folder.metrics)
    assert readings[0]["grad_norm"] is None
    assert [reading["step"] for reading in readings] == list(range(1, 10))


def test_only_the_first_rank_writes(tmp_path: Path, values: Values) -> None:
    folder = write(recipe_of(tmp_path / "run", "--logging.prometheus", str(tmp_path)), 0, range(1, 3), values, rank=1)
    assert not list(folder.path.iterdir())


def test_a_run_has_the_sinks_of_its_recipe(tmp_path: Path, values: Values) -> None:
    folder = write(
        recipe_of(tmp_path / "run", "--logging.prometheus", str(tmp_path / "mine.prom")), 0, range(1), values
    )
    assert {file.name for file in folder.path.iterdir()} == {"metrics.jsonl", "tensorboard"}
    assert "mvd_scale_loss" in (tmp_path / "mine.prom").read_text()
    assert json.loads(folder.metrics.read_text())["loss"] == 1.25


def test_what_a_recipe_asks_for_is_checked_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_sinks(recipe_of(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'mvd-scale\[wandb\]'"):
        check_sinks(recipe_of(tmp_path, "--logging.wandb.project", "mine"))
    with pytest.raises(UserError, match=r"logging\.prometheus .*metrics\.txt: expected an existing folder"):
        check_sinks(recipe_of(tmp_path, "--logging.prometheus", str(tmp_path / "metrics.txt")))
