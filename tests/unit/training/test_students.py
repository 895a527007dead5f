"""Several students in one trainer: each does what it would do alone. Engines are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.performance.batches import BatchLoader
from mvd_scale.targets.build import SharedTeachers, build_targets, init_teacher, merge_targets
from mvd_scale.training.distillation import random_student
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.teachers.prefetch import TeacherPrefetcher
from mvd_scale.training.trained_model import TrainedModel
from mvd_scale.training.trainer import Trainer

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
RECIPE = load_recipe("quickstart/student", ["--training.precision", "fp32", "--training.micro_batch", "1"])


class Engine:
    """Stand-in for an engine, whose weights are the number of its steps; it skips losses that are not finite."""

    def __init__(self) -> None:
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "lr_scale": 1.0, "decays": False}])
        self.module = nn.Linear(1, 1)
        self.skipped_steps = self.weights = 0

    def backward(self, loss: Tensor) -> None:
        self.loss = loss

    def step(self) -> None:
        finite = bool(torch.isfinite(self.loss))
        self.skipped_steps += not finite
        self.weights += finite


class Drawing:
    """Objective whose loss is a random number, and not a number in the steps `spoiled`."""

    parts = ("image",)

    def __init__(self, draws: int, spoiled: tuple[int, ...] = ()) -> None:
        self.draws, self.spoiled, self.calls = draws, spoiled, -1
        self.teachers: dict[str, nn.Module] = {}

    def __call__(self, engine: Engine, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        loss = torch.rand(self.draws).sum()
        return (loss * float("nan") if self.calls in self.spoiled else loss), {"image": loss}


def model(name: str, objective: Drawing) -> TrainedModel:
    schedule = Schedule(RECIPE.training, 100, RECIPE.lr_batch)
    return TrainedModel(Engine(), objective, schedule, name=name)


def trainer(*models: TrainedModel, recipe: Recipe = RECIPE) -> Trainer:
    nothing = torch.zeros(1, dtype=torch.int64)
    batch = ClipBatch(torch.zeros(1, 1), nothing, nothing, nothing, nothing)
    return Trainer(models, TeacherPrefetcher(BatchLoader(repeat(batch))), recipe, ALONE)


def losses(made: Trainer, steps: int, name: str) -> Iterator[float]:
    for _ in range(steps):
        for micro in made.train_step():
            yield float(micro.losses[name])


def test_each_student_draws_what_it_draws_alone() -> None:
    alone = list(losses(trainer(model("", Drawing(5))), 3, "loss"))
    assert len(set(alone)) == len(alone) == 3 * trainer(model("", Drawing(5))).accumulation
    # The student before it draws another number of random numbers.
    both = trainer(model("a", Drawing(3)), model("b", Drawing(5)))
    assert list(losses(both, 3, "students/b/loss")) == alone


def test_the_loss_of_a_step_is_the_sum_of_all_and_each_has_its_names() -> None:
    (micro, *_) = trainer(model("a", Drawing(3)), model("b", Drawing(5))).train_step()
    names = ["students/a/loss", "students/a/loss/image", "students/b/loss", "students/b/loss/image"]
    assert list(micro.losses) == names
    assert micro.loss == micro.losses["students/a/loss"] + micro.losses["students/b/loss"]


@pytest.fixture
def _gather(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(parts: list[Any], mine: Any) -> None:
        parts[:] = [mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


@pytest.mark.usefixtures("_gather")
def test_a_student_that_is_not_finite_skips_its_own_step_alone(caplog: pytest.LogCaptureFixture) -> None:
    micro = trainer(model("", Drawing(1))).accumulation
    spoiled, sound = model("a", Drawing(1, (2 * micro - 1,))), model("b", Drawing(1))
    updates: list[tuple[str, int | str]] = []
    for each in (spoiled, sound):
        add = partial(lambda name, step="skipped": updates.append((name, step)), each.name)
        each.averages = [SimpleNamespace(update=add, skip=add)]  # type: ignore[list-item]
    made = trainer(spoiled, sound)
    with caplog.at_level("WARNING"):
        for _ in range(3):
            made.train_step()
    assert "are not finite in 'forward' of step 2 of students.a" in caplog.text
    assert (spoiled.engine.skipped_steps, sound.engine.skipped_steps) == (1, 0)
    # Neither does its moving average move in that step.
    assert updates == [("a", 0), ("b", 0), ("a", "skipped"), ("b", 1), ("a", 2), ("b", 2)]


@pytest.mark.usefixtures("_gather")
def test_the_run_ends_when_one_student_is_not_finite_too_often() -> None:
    training = RECIPE.training.model_copy(update={"skip_nonfinite_steps": 1})
    always = model("a", Drawing(1, tuple(range(1000))))
    made = trainer(model("b", Drawing(1)), always, recipe=RECIPE.model_copy(update={"training": training}))
    made.train_step()
    with pytest.raises(UserError, match=r"not finite in 'forward' of step 2 of students\.a, nor were those"):
        made.train_step()


def test_a_shared_teacher_is_one_part_and_a_moving_one_a_part_of_its_student() -> None:
    shared, first, second = (Drawing(1) for _ in range(3))
    teacher = nn.Identity()
    first.teachers = {"video": teacher, "average": nn.Identity()}
    second.teachers = {"video": teacher, "average": nn.Identity()}
    shared.teachers = {"video": teacher}
    own = ["student forward", "backward", "optimizer", "moving average"]
    assert trainer(model("a", first), model("b", second)).part_names == [
        "data wait", "video teacher", "a: average teacher", "b: average teacher",
        *(f"a: {part}" for part in own), *(f"b: {part}" for part in own),
    ]  # fmt: skip
    assert trainer(model("", shared)).part_names == ["data wait", "video teacher", *own]


def test_initial_weights_depend_on_the_seed_and_the_student_alone() -> None:
    recipe = load_recipe("quickstart/student", ["--students", "{a: {}, b: {model: {depth: 3}}}"])
    teachers = SharedTeachers(init_teacher)
    first, second = (
        build_targets(alone, lambda name, alone=alone: teachers(alone, name))  # type: ignore[misc]
        for alone in recipe.each_student().values()
    )
    assert first["video"].teacher is second["video"].teacher  # type: ignore[attr-defined]
    assert merge_targets([first, second]) == first
    torch.rand(7)
    for name in ("a", "b"):
        weights = random_student(recipe.alone(name), first).state_dict()
        torch.rand(3)
        again = random_student(recipe.alone(name), first).state_dict()
        assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_the_folder_of_a_student_is_a_run_folder(tmp_path: Path) -> None:
    from mvd_scale.run_dir import RunFolder
    from mvd_scale.run_status import find_runs

    folder = RunFolder(tmp_path)
    assert folder.of_student("") is folder
    small = folder.of_student("small")
    assert small.checkpoints == tmp_path / "students" / "small" / "checkpoints"
    small.path.mkdir(parents=True)
    folder.recipe.touch()
    small.recipe.touch()
    assert find_runs(tmp_path) == [tmp_path, small.path]
