"""Checkpoints of several students: the newest step that all have is resumed from, and only such steps count."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mvd_scale.config.training import CheckpointConfig
from mvd_scale.errors import UserError
from mvd_scale.training.checkpointing import selection
from mvd_scale.training.checkpointing.folders import saved_steps
from mvd_scale.training.checkpointing.selection import Retention, choose_resumed_step


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of two students, whose checkpoints are damaged if they hold a file `torn`."""
    monkeypatch.setattr(
        selection, "find_damage", lambda folder: "it lost bytes" if (folder / "torn").exists() else None
    )
    return [tmp_path / "a", tmp_path / "b"]


def save(path: Path, *steps: int, suffix: str = "", torn: bool = False) -> None:
    for step in steps:
        folder = path / f"step_{step:08d}{suffix}"
        folder.mkdir(parents=True)
        if torn:
            (folder / "torn").touch()


def names(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir())


def test_the_newest_step_that_all_have_is_resumed_from(paths: list[Path]) -> None:
    a, b = paths
    save(a, 10, 20, 30)
    save(b, 10, 20)
    assert choose_resumed_step(paths) == 20
    # It is out of the way of the next checkpoint after 30 steps.
    assert names(a) == ["step_00000010", "step_00000020", "step_00000030.ahead"]
    assert saved_steps(b) == [10, 20]


def test_a_damaged_one_of_one_student_is_passed_over_for_all(paths: list[Path]) -> None:
    a, b = paths
    save(a, 10, 20)
    save(b, 10)
    save(b, 20, torn=True)
    assert choose_resumed_step(paths) == 10
    assert names(a) == ["step_00000010", "step_00000020.ahead"]
    assert names(b) == ["step_00000010", "step_00000020.torn"]
    assert choose_resumed_step(paths) == 10


def test_a_run_that_was_killed_in_its_first_save_begins_anew(paths: list[Path]) -> None:
    a, b = paths
    assert choose_resumed_step(paths) is None
    save(a, 5)
    save(b, 5, suffix=".partial")
    assert choose_resumed_step(paths) is None
    assert names(a) == ["step_00000005.ahead"]


@pytest.mark.parametrize("steps", [(5,), (5, 10)])
def test_a_student_that_lost_its_checkpoints_does_not_begin_anew_in_silence(
    paths: list[Path], steps: tuple[int, ...]
) -> None:
    a, _ = paths
    save(a, *steps)
    with pytest.raises(UserError, match=r"no checkpoint of the same step \(.*a has 5.*; .*b has none\)"):
        choose_resumed_step(paths)
    assert saved_steps(a) == list(steps)


def test_nothing_is_renamed_if_no_step_is_whole_for_all(paths: list[Path]) -> None:
    a, b = paths
    save(a, 5)
    save(b, 5, torn=True)
    with pytest.raises(UserError, match=r"is whole \(.*b/step_00000005: it lost bytes\)"):
        choose_resumed_step(paths)
    assert saved_steps(a) == saved_steps(b) == [5]


def test_a_checkpoint_goes_when_all_students_have_newer_ones(paths: list[Path]) -> None:
    a, b = paths
    retention = Retention(paths, CheckpointConfig(keep=1))
    save(a, 10, 20)
    save(b, 10)
    retention.delete_old()
    # Killed now, the run resumes from 10.
    assert (saved_steps(a), saved_steps(b)) == ([10, 20], [10])
    save(b, 20)
    retention.delete_old()
    assert (saved_steps(a), saved_steps(b)) == ([20], [20])


def test_a_checkpoint_that_a_kill_left_of_one_student_goes_with_the_next_save(paths: list[Path]) -> None:
    a, b = paths
    save(a, 20)
    save(b, 10, 20)
    Retention(paths, CheckpointConfig(keep=1)).delete_old()
    assert (saved_steps(a), saved_steps(b)) == ([20], [20])


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning_and_tried_again(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = paths
    save(a, 10, 20)
    save(b, 10, 20)
    delete, said = shutil.rmtree, []

    def fail_in_a(folder: Path) -> None:
        if folder.parent == a:
            raise OSError(39, "Directory not empty")
        delete(folder)

    monkeypatch.setattr(selection.shutil, "rmtree", fail_in_a)
    monkeypatch.setattr(selection.logger, "warning", lambda text, *values: said.append(text % values))
    retention = Retention(paths, CheckpointConfig(keep=1))
    retention.delete_old()
    assert (saved_steps(a), saved_steps(b)) == ([10, 20], [20])
    (line,) = said
    assert line.startswith(f"old checkpoint {a}/step_00000010 cannot be deleted: [Errno 39] Directory not empty; ")
    monkeypatch.setattr(selection.shutil, "rmtree", delete)
    retention.delete_old()
    assert saved_steps(a) == [20]
