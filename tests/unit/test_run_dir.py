"""A run's folder is never overwritten by another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("quickstart/video_teacher", ["--run.folder", str(tmp_path / "run")])


def videos(name: str) -> Manifest:
    return Manifest.from_rows([Row(name=name, path=name, frames=16, width=32, height=32)], source=name)


def begun(recipe: Recipe) -> RunFolder:
    folder = RunFolder(recipe.run.folder)
    folder.claim()
    folder.record(recipe, videos("a.mp4"))
    folder.metrics.write_text('{"step": 1}\n')
    return folder


def test_the_same_run_may_go_on(recipe: Recipe) -> None:
    begun(recipe).check(recipe)


def test_another_run_is_refused_and_the_differences_are_named(recipe: Recipe) -> None:
    folder = begun(recipe)
    wider = load_recipe("quickstart/video_teacher", ["--run.folder", str(folder.path), "--model.width", "256"])
    with pytest.raises(UserError, match=r"model\.width: that run has 128, this one 256"):
        folder.check(wider)


def test_other_videos_are_refused_and_nothing_is_overwritten(recipe: Recipe) -> None:
    folder = begun(recipe)
    folder.record(recipe, videos("a.mp4"))
    with pytest.raises(UserError, match=r"other videos than those of b\.mp4"):
        folder.record(recipe, videos("b.mp4"))
    assert Manifest.load(folder.manifest).source == "a.mp4"


def test_a_finished_run_is_finished_with_the_same_data_and_weights_only(recipe: Recipe) -> None:
    folder = begun(recipe)
    assert not folder.is_finished(7, {"videos": "x"})
    folder.finish({"steps": 7, "origin": {"videos": "x"}})
    assert folder.is_finished(7, {"videos": "x"})
    assert not folder.is_finished(8, {"videos": "y"})
    with pytest.raises(UserError, match="a finished run with other videos"):
        folder.is_finished(7, {"videos": "y"})


def test_a_start_that_never_took_a_step_may_be_corrected(recipe: Recipe) -> None:
    folder = RunFolder(recipe.run.folder)
    folder.claim()
    folder.record(recipe, videos("a.mp4"))
    folder.dali_failures.write_text("{}")
    folder.record(recipe, videos("b.mp4"))
    assert not folder.dali_failures.exists(), "failures to decode other videos"
    folder.check(load_recipe("quickstart/video_teacher", ["--seed", "5"]))


def test_two_processes_do_not_share_a_folder(recipe: Recipe) -> None:
    first = RunFolder(recipe.run.folder)
    first.claim()
    with pytest.raises(UserError, match="another process is training"):
        RunFolder(recipe.run.folder).claim()


def test_a_folder_that_was_released_is_free(recipe: Recipe) -> None:
    first = RunFolder(recipe.run.folder)
    first.claim()
    first.check_lease()
    first.release()
    second = RunFolder(recipe.run.folder)
    second.check(recipe)
    second.claim()
    with pytest.raises(UserError, match="was taken over by process"):
        first.check_lease()


def test_a_summary_is_not_written_over_that_of_the_process_that_took_over(recipe: Recipe) -> None:
    folder = begun(recipe)
    folder.lease_file.unlink()
    with pytest.raises(UserError, match="is gone"):
        folder.finish({"steps": 7})
    assert not folder.summary.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.folder .*file/run cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run").claim()


def test_a_folder_of_something_else_is_refused(recipe: Recipe) -> None:
    recipe.run.folder.mkdir()
    (recipe.run.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no run"):
        RunFolder(recipe.run.folder).check(recipe)
