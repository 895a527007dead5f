"""A run's folder is never overwritten by another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.errors import UserError
from mvd_scale.training.run_folder import RunFolder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("quickstart/video_teacher", ["--run.folder", str(tmp_path / "run")])


def begun(recipe: Recipe) -> RunFolder:
    folder = RunFolder(recipe.run.folder)
    folder.claim(recipe)
    folder.metrics.write_text('{"step": 1}\n')
    return folder


def test_the_same_run_may_go_on(recipe: Recipe) -> None:
    begun(recipe).check(recipe)


def test_another_run_is_refused_and_the_differences_are_named(recipe: Recipe) -> None:
    folder = begun(recipe)
    wider = load_recipe("quickstart/video_teacher", ["--run.folder", str(folder.path), "--model.width", "256"])
    with pytest.raises(UserError, match=r"model\.width: the run there has 128, this one 256"):
        folder.check(wider)


def test_a_start_that_never_took_a_step_may_be_corrected(recipe: Recipe) -> None:
    folder = RunFolder(recipe.run.folder)
    folder.claim(recipe)
    folder.check(load_recipe("quickstart/video_teacher", ["--seed", "5"]))


def test_two_processes_do_not_share_a_folder(recipe: Recipe) -> None:
    first = RunFolder(recipe.run.folder)
    first.claim(recipe)
    with pytest.raises(UserError, match="another process is training"):
        RunFolder(recipe.run.folder).claim(recipe)


def test_a_folder_of_something_else_is_refused(recipe: Recipe) -> None:
    recipe.run.folder.mkdir()
    (recipe.run.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no run"):
        RunFolder(recipe.run.folder).check(recipe)
