"""The event log says how the processes of a run ended, and the folder is free afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from mvd_scale.config import load_recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import Preempted, UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.run_events import describe_end, record_start, recording_end
from mvd_scale.utils.events import read_events
from mvd_scale.utils.lease import look_at_lease


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Preempted(143), ("stopped", "", 143)),
        (UserError("no room"), ("invalid", "no room", 2)),
        (OSError(28, "No space left"), ("invalid", "[Errno 28] No space left", 2)),
        (KeyboardInterrupt(), ("stopped", "a second Ctrl-C", 130)),
        (RuntimeError("CUDA error: ECC"), ("error", "RuntimeError: CUDA error: ECC", 75)),
        (RuntimeError("x" * 9000), ("error", "RuntimeError: " + "x" * 2000, 1)),
    ],
)
def test_an_end_has_a_reason_and_an_exit_code(error: BaseException, expected: tuple[str, str, int]) -> None:
    assert describe_end(error) == expected


def test_a_run_that_fails_leaves_its_message_and_a_free_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    def fail() -> None:
        folder.claim()
        folder.metrics.write_text('{"step": 40}\n')
        raise UserError("no videos")

    with pytest.raises(UserError, match="no videos"), recording_end(folder):
        fail()
    (event,) = read_events(folder.events)
    shown = {name: event[name] for name in ("event", "reason", "message", "exit_code", "step")}
    assert shown == {"event": "end", "reason": "invalid", "message": "no videos", "exit_code": 2, "step": 40}
    assert look_at_lease(folder.lease_file).alive is False


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    """A start that is refused, because another process trains there, writes nothing."""
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.claim()
    with pytest.raises(UserError, match="another process"), recording_end(second):
        second.claim()
    assert not first.events.exists()
    assert look_at_lease(first.lease_file).alive is True
    first.release()


def test_a_start_names_hosts_batch_and_steps(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart/video_teacher", ["--run.folder", str(tmp_path), "--training.micro_batch", "4"])
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    folder = RunFolder(tmp_path)
    try:
        with recording_end(folder):
            folder.claim()
            schedule = Schedule(recipe.training, 10, recipe.lr_batch)
            record_start(folder, recipe, schedule, Ranks(0, 0, 1, torch.device("cpu")))
    finally:
        torch.distributed.destroy_process_group()
    start, end = read_events(folder.events)
    assert start["hosts"] == {start["host"]: 1}
    assert (start["ranks"], start["steps"], start["precision"]) == (1, schedule.last_step, recipe.training.precision)
    assert start["micro_batch"] * start["accumulation"] == start["global_batch"] == recipe.training.global_batch
    assert (end["event"], end["reason"], end["exit_code"]) == ("end", "finished", 0)


def test_a_command_that_finds_the_run_finished_adds_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with recording_end(folder):
        folder.claim()
    assert read_events(folder.events) == []
