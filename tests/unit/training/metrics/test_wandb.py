"""A run has one run of wandb, however often it resumes, and no step twice. By a fake of the package, and by its own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.metrics.sink import Values
from mvd_scale.training.metrics.wandb import Wandb
from mvd_scale.training.metrics.writer import MetricWriter


class CommError(Exception):
    pass


class AuthenticationError(CommError):
    pass


class UsageError(Exception):
    pass


class FakeWandb:
    """The part of the package that is used, with a server that keeps what was logged by the id of the run."""

    errors = SimpleNamespace(CommError=CommError, AuthenticationError=AuthenticationError, UsageError=UsageError)

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: dict[str, list[dict[str, Any]]] = {}
        self.exit_codes: list[int] = []
        self.refusal: Exception | None = None

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def Image(self, pixels: Any) -> tuple[str, Any]:
        return "image", pixels.shape

    def init(self, **arguments: Any) -> Any:
        self.started.append(arguments)
        if self.refusal is not None and arguments["mode"] == "online":
            raise self.refusal
        logged = self.logged.setdefault(arguments["id"], [])
        return SimpleNamespace(
            log=logged.append,
            define_metric=lambda *_, **__: None,
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "run").mkdir()
    words = ["--run.folder", str(tmp_path / "run"), "--logging.wandb", "{project: videos, entity: us, tags: [a, b]}"]
    return load_recipe("quickstart/video_teacher", words)


def sink(recipe: Recipe, logged_step: int = 0) -> Wandb:
    assert recipe.logging.wandb is not None
    return Wandb(recipe.logging.wandb, recipe, RunFolder(recipe.run.folder), logged_step)


def test_a_run_begins_as_its_recipe_says(wandb: FakeWandb, recipe: Recipe, values: Values) -> None:
    run = sink(recipe)
    run.open()
    run.write(20, values)
    run.show(20, "predictions", np.zeros((4, 6, 3), np.uint8))
    run.show(20, "probe/knn_top1", 0.5)
    run.close(failed=True)
    (arguments,) = wandb.started
    shown = {name: arguments[name] for name in ("project", "entity", "name", "tags", "mode", "resume", "dir")}
    assert shown == {
        "project": "videos", "entity": "us", "name": "run", "tags": ["a", "b"], "mode": "online", "resume": "allow",
        "dir": str(recipe.run.folder),
    }  # fmt: skip
    assert arguments["config"]["training"]["global_batch"] == recipe.training.global_batch
    (logged,) = wandb.logged.values()
    assert logged == [
        {"step": 20, **values},
        {"step": 20, "predictions": ("image", (4, 6, 3))},
        {"step": 20, "probe/knn_top1": 0.5},
    ]
    assert wandb.exit_codes == [1]


def test_a_resumed_run_goes_on_under_its_id_and_repeats_no_step(
    wandb: FakeWandb, recipe: Recipe, values: Values
) -> None:
    first = sink(recipe)
    first.open()
    for step in (1, 2, 3):
        first.write(step, values)
    second = sink(recipe, logged_step=3)
    second.open()
    for step in (2, 3, 4):
        second.write(step, values)
        second.show(step, "predictions", np.zeros((4, 6, 3), np.uint8))
    (logged,) = wandb.logged.values()
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in logged if "predictions" in line] == [4]


def test_a_file_of_the_id_that_is_torn_is_written_anew(wandb: FakeWandb, recipe: Recipe) -> None:
    RunFolder(recipe.run.folder).wandb.write_text("{")
    for _ in range(2):
        sink(recipe).open()
    assert len(wandb.logged) == 1


@pytest.mark.parametrize("refusal", [AuthenticationError("no key"), UsageError("no such entity")])
def test_a_refusal_says_what_to_do(refusal: Exception, wandb: FakeWandb, recipe: Recipe) -> None:
    wandb.refusal = refusal
    with pytest.raises(UserError, match=rf"{refusal}.*`wandb login`.*logging\.wandb\.mode to offline"):
        sink(recipe).open()


def test_a_server_that_cannot_be_reached_does_not_keep_a_run_from_starting(
    wandb: FakeWandb, recipe: Recipe, values: Values, logged: list[str]
) -> None:
    wandb.refusal = CommError("timed out")
    run = sink(recipe)
    run.open()
    run.write(1, values)
    assert [arguments["mode"] for arguments in wandb.started] == ["online", "offline"]
    assert logged == ["WARNING wandb cannot be reached: timed out; the run is logged offline, see `wandb sync`"]


def test_a_run_that_did_not_begin_is_no_error_of_the_run(
    wandb: FakeWandb, recipe: Recipe, values: Values, logged: list[str]
) -> None:
    wandb.refusal = RuntimeError("its service does not start")
    with MetricWriter([sink(recipe)]) as writer:
        writer.write(1, values)
        writer.write(2, values)
    assert logged == ["WARNING wandb cannot be written: its service does not start; the run goes on without"]


def test_the_package_itself_takes_these_arguments(
    tmp_path: Path, recipe: Recipe, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs the wandb extra")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for logged_step in (0, 2):
        run = sink(load_recipe(str(_offline(recipe, tmp_path)), []), logged_step)
        run.open()
        for step in (1, 2, 3):
            run.write(step, values)
            run.show(step, "predictions", np.zeros((4, 6, 3), np.uint8))
        run.close(failed=False)
    files = sorted((recipe.run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1


def _offline(recipe: Recipe, tmp_path: Path) -> Path:
    file = tmp_path / "offline.yaml"
    offline = recipe.logging.model_copy(update={"wandb": recipe.logging.wandb.model_copy(update={"mode": "offline"})})  # type: ignore[union-attr]
    file.write_text(recipe.model_copy(update={"logging": offline}).to_yaml())
    return file
