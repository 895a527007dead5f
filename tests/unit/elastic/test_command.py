"""The supervised command: its recipe, its run folder, and what identifies a job."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvd_scale.cli.supervise import _recipe, supervise
from mvd_scale.elastic.command import SupervisedCommand
from mvd_scale.elastic.lease_watch import LeaseWatch
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.utils.events import read_events
from mvd_scale.utils.lease import Lease
from mvd_scale.utils.machine import ProcessSpace

WORDS = ("pretrain", "--recipe", "quickstart/student", "--training.global_batch", "12", "--data.source", "clips")


@pytest.fixture
def command(tmp_path: Path) -> SupervisedCommand:
    words = (*WORDS, "--run.folder", str(tmp_path / "run"))
    return SupervisedCommand(words, _recipe(words))


@pytest.fixture
def folder(command: SupervisedCommand) -> Iterator[RunFolder]:
    folder = RunFolder(command.recipe.run.folder)
    folder.path.mkdir()
    yield folder
    folder.release()


def test_the_recipe_says_how_many_ranks_there_may_be(command: SupervisedCommand) -> None:
    assert [ranks for ranks in range(1, 14) if command.allows(ranks)] == [1, 2, 3, 4, 6, 12]
    assert command.command[-len(WORDS) - 2 :][0] == "pretrain"


@pytest.mark.parametrize("words", [("pipeline", "quickstart"), ("detect", "evaluate", "x"), ("evaluate", "x")])
def test_a_command_that_does_not_resume_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"^supervise cannot restart '.+': expected pretrain, finetune, detect train"):
        _recipe(words)


def test_jobs_differ_by_words_and_hosts(command: SupervisedCommand) -> None:
    digests = {
        command.digest(["a", "b"]),
        command.digest(["a"]),
        SupervisedCommand(WORDS, command.recipe).digest(["a"]),
    }
    assert len(digests) == 3


def test_a_folder_is_held_by_a_process_that_lives(command: SupervisedCommand, folder: RunFolder) -> None:
    assert command.folder_holder() is None
    folder.claim()
    held = command.folder_holder()
    assert held is not None
    assert f"process {os.getpid()}" in held
    folder.release()
    assert command.folder_holder() is None


def test_a_folder_of_another_host_is_held_as_long_as_that_renews(tmp_path: Path) -> None:
    watch = LeaseWatch(tmp_path / "lease.json", seconds=0.3)
    space = ProcessSpace("node-7", "another boot", "its pids")
    lease = Lease(tmp_path / "lease.json", renew_seconds=0.05, space=space)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert "host node-7" in (watch.holder() or "")
        time.sleep(0.02)
    lease._ended.set()
    lease._thread.join()
    assert watch.holder() is not None
    time.sleep(0.4)
    assert watch.holder() is None


def stale(*_: object) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_a_folder_that_cannot_be_read_for_a_moment_is_held(
    command: SupervisedCommand, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", stale)
        assert command.folder_holder() == f"{folder.lease_file} cannot be read (Stale file handle)"
    assert command.folder_holder() is None


def test_a_restart_that_cannot_be_recorded_is_a_warning(
    command: SupervisedCommand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "exists", stale)
    command.record_restart("lost node-2", {"node-1": 2}, 2)
    assert "cannot be read (Stale file handle): the restart is not recorded" in caplog.text


def test_restarts_are_events_of_a_run_that_has_begun(command: SupervisedCommand, folder: RunFolder) -> None:
    command.record_restart("lost node-2", {"node-1": 2}, 2)
    assert list(folder.path.iterdir()) == []
    folder.claim()
    command.record_restart("lost node-2", {"node-1": 2, "node-3": 1}, 3)
    (event,) = read_events(folder.events)
    expected = {"event": "restart", "reason": "lost node-2", "hosts": ["node-1", "node-3"], "ranks": 3, "attempt": 3}
    assert expected.items() <= event.items()


def test_without_a_hostfile_no_host_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^--host is node-9, but there is no hostfile: give `--hostfile`, or leave out"
    ):
        supervise.main(["--host", "node-9", "pretrain"], standalone_mode=False)
