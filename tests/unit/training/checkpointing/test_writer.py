"""Checkpoints that a thread writes: the training goes on meanwhile, and every error names the last whole one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed import HashStore

from mvd_scale.checkpoints.tensor_folder import TensorFolderWriter, read_tensors
from mvd_scale.config.training import CheckpointConfig
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import SharedError, UserError
from mvd_scale.performance.benchmarks.simulated_ranks import SimulatedJob
from mvd_scale.training.checkpointing import writer as module
from mvd_scale.training.checkpointing.files import find_damage, flush_folder
from mvd_scale.training.checkpointing.folders import saved_steps
from mvd_scale.training.checkpointing.host_copy import HostCopy
from mvd_scale.training.checkpointing.pieces import Pieces, State
from mvd_scale.training.checkpointing.selection import Retention
from mvd_scale.training.checkpointing.writer import CheckpointWriter


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def state(value: float) -> State:
    return {"model.w": Pieces.of_range(torch.full((1000,), value), 0, (10, 100))}


def make(path: Path, **config: Any) -> CheckpointWriter:
    return CheckpointWriter(path, Ranks(0, 0, 1, torch.device("cpu")), Retention([path], CheckpointConfig(**config)))


def write(writer: CheckpointWriter, step: int, value: float = 0.0) -> None:
    writer.make_room(step, 4000)
    writer.start(step, state(value), {"step": step, "weights": {}})


def test_a_checkpoint_appears_whole(tmp_path: Path) -> None:
    writer = make(tmp_path)
    write(writer, 7, 3.0)
    writer.wait()
    (folder,) = tmp_path.iterdir()
    assert folder.name == "step_00000007"
    assert find_damage(folder) is None
    assert torch.equal(read_tensors(folder)["model.w"], torch.full((10, 100), 3.0))


def test_the_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), threading.Event()
    save = module.save_pieces

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return save(*arguments, **options)

    monkeypatch.setattr(module, "save_pieces", slow)
    writer, weights = make(tmp_path), torch.ones(1000)
    writer.make_room(5, 4000)
    copied = HostCopy().copy({"model.w": Pieces.of_range(weights, 0, (1000,))})
    writer.start(5, copied, {"step": 5, "weights": {}})
    assert begun.wait(60)
    weights.fill_(2)  # the next step
    assert not saved_steps(tmp_path)
    go.set()
    writer.wait()
    assert torch.equal(read_tensors(tmp_path / "step_00000005")["model.w"], torch.ones(1000))


def test_the_newest_are_kept_and_those_of_an_interval(tmp_path: Path) -> None:
    writer = make(tmp_path, keep=2, keep_every_steps=20)
    for step in (10, 20, 30, 40, 50, 60):
        write(writer, step)
        writer.wait()
    assert saved_steps(tmp_path) == [20, 40, 50, 60]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make(tmp_path)
    write(writer, 10)
    writer.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 2**20))
    with pytest.raises(UserError, match=r"no room for checkpoint .*step_00000020: it takes 7\.00 GiB, and 0\.00 GiB"):
        writer.make_room(20, 7 * 2**30)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_00000010"]


@pytest.mark.parametrize("broken", ["save_pieces", "describe_files", "complete_description", "write_record"])
def test_an_error_of_writing_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    writer = make(tmp_path)
    write(writer, 10)
    writer.wait()

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, broken, fail)
    write(writer, 20)
    with pytest.raises(
        UserError, match=r"step_00000020 could not be written: .*No space left.* whole one is .*_00000010"
    ):
        writer.wait()
    assert saved_steps(tmp_path) == [10]
    assert find_damage(tmp_path / "step_00000010") is None
    monkeypatch.undo()
    # The next one does not stumble over the remains.
    write(writer, 30)
    writer.wait()
    assert saved_steps(tmp_path) == [10, 30]


def test_a_checkpoint_on_disk_is_told_with_its_seconds(tmp_path: Path) -> None:
    writer, told = make(tmp_path), []

    def saved(seconds: float) -> None:
        told.append((seconds, saved_steps(tmp_path)))

    writer.make_room(7, 4000)
    writer.start(7, state(1.0), {"step": 7, "weights": {}}, saved)
    writer.wait()
    ((seconds, steps),) = told
    assert seconds > 0
    assert steps == [7]


def test_a_folder_that_was_taken_over_meanwhile_gets_no_checkpoint(tmp_path: Path) -> None:
    def lost() -> None:
        raise UserError("taken over by process 7 of host b")

    writer = CheckpointWriter(
        tmp_path, Ranks(0, 0, 1, torch.device("cpu")), Retention([tmp_path], CheckpointConfig()), lost
    )
    write(writer, 7)
    with pytest.raises(UserError, match="taken over by process 7 of host b"):
        writer.wait()
    assert saved_steps(tmp_path) == []


def share(ranks: Ranks) -> State:
    """Half of a tensor for each of two ranks."""
    return {"model.w": Pieces.of_range(torch.full((10,), float(ranks.rank)), 10 * ranks.rank, (20,))}


def test_the_pieces_of_all_ranks_become_one_description(tmp_path: Path) -> None:
    def save(ranks: Ranks) -> None:
        writer = CheckpointWriter(tmp_path, ranks, Retention([tmp_path], CheckpointConfig()))
        run_on_rank0(ranks, "room", lambda: writer.make_room(3, 80))
        writer.start(3, share(ranks), {"step": 3, "weights": {}})
        writer.wait()

    SimulatedJob(2).run(save)
    folder = tmp_path / "step_00000003"
    names = ["__0_0.distcp", "__1_0.distcp", "files.json", "state.json", "tensors.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert find_damage(folder) is None
    assert read_tensors(folder)["model.w"].tolist() == [0.0] * 10 + [1.0] * 10


def test_the_watchdog_is_told_which_ranks_still_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 writes until its part is on disk, rank 0 until the checkpoint is complete."""
    go, save = threading.Event(), module.save_pieces

    def wait_on_rank_0(state: State, folder: Path, planner: Any, rank: int) -> None:
        assert rank or go.wait(30)
        save(state, folder, planner, rank)

    monkeypatch.setattr(module, "save_pieces", wait_on_rank_0)

    def write_together(ranks: Ranks) -> list[tuple[int, int, int]]:
        writer = CheckpointWriter(tmp_path, ranks, Retention([tmp_path], CheckpointConfig()))
        run_on_rank0(ranks, "room", lambda: writer.make_room(3, 80))
        writer.start(3, share(ranks), {"step": 3, "weights": {}})
        seen = [ranks.progress.position.written] if ranks.is_main else []
        if not ranks.is_main:
            deadline = time.monotonic() + 30
            while ranks.progress.position.writing:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            seen.append(ranks.progress.position.written)
            go.set()
        writer.wait()
        return [*seen, ranks.progress.position.written]

    main, other = SimulatedJob(2).run(write_together)
    (waiting, done), (own, end) = main, other
    assert waiting == (0, 0, 3)
    assert done[0] == own[0] == 1
    assert done[1] > 0, "tensors that were written count"
    assert done[2] == own[2] == end[2] == 0


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
def test_a_thread_that_has_ended_writes_no_more(
    error: OSError | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error is not None:
        monkeypatch.setattr(module, "save_pieces", lambda *_: (_ for _ in ()).throw(error))
    writer = make(tmp_path)
    write(writer, 7)
    writer.finish(30)
    assert writer.has_failed == (error is not None)
    assert writer.ranks.progress.position.writing == 0


def test_an_error_of_one_rank_is_known_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = module.describe_files

    def fail(files: Iterator[Path]) -> Any:
        found = list(files)
        if any(file.name.startswith("__1_") for file in found):
            raise OSError(5, "Input/output error")
        return described(found)

    logged: list[str] = []
    monkeypatch.setattr(module, "describe_files", fail)
    monkeypatch.setattr(module.logger, "error", lambda text, *values: logged.append(text % values))

    def save(ranks: Ranks) -> SharedError:
        writer = CheckpointWriter(tmp_path, ranks, Retention([tmp_path], CheckpointConfig()))
        run_on_rank0(ranks, "room", lambda: writer.make_room(3, 80))
        writer.start(3, share(ranks), {"step": 3, "weights": {}})
        deadline = time.monotonic() + 30
        while not writer.has_failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(SharedError) as caught:
            writer.wait()
        assert ranks.progress.position.parts == 1
        return caught.value

    named = rf"could not be written: rank 1 \(host {re.escape(socket.gethostname())}, pid {os.getpid()}\) failed in "
    for error in SimulatedJob(2).run(save):
        assert re.search(named + r"'save' of step 3: \[Errno 5\] Input/output error; there is no other", str(error))
        assert error.ranks == (1,)
    assert len(logged) == 1, "by rank 0 alone"
    assert not saved_steps(tmp_path)


def test_a_tensor_whose_pieces_are_not_all_of_it_is_no_checkpoint(tmp_path: Path) -> None:
    writer = make(tmp_path)
    writer.make_room(3, 80)
    writer.start(3, {"model.w": Pieces.of_range(torch.zeros(10), 0, (20,))}, {"step": 3, "weights": {}})
    with pytest.raises(UserError, match=r"hold 10 of the 20 elements of model\.w"):
        writer.wait()


def test_a_failed_run_does_not_wait_for_a_rank_that_is_gone(tmp_path: Path) -> None:
    alone, *_ = SimulatedJob(2).ranks
    writer = CheckpointWriter(tmp_path, alone, Retention([tmp_path], CheckpointConfig()))
    writer.make_room(3, 80)
    writer.start(3, share(alone), {"step": 3, "weights": {}})
    writer.finish(0.2)
    assert not saved_steps(tmp_path)


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_flush_folders_is_no_failure(
    number: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with nullcontext() if passes else pytest.raises(OSError, match="Input/output error"):
        flush_folder(tmp_path)


def test_pieces_are_written_without_a_stream_of_a_gpu(tmp_path: Path) -> None:
    """They are on the CPU: torch takes its loader with streams only where it may copy ahead."""
    assert TensorFolderWriter(tmp_path, 0).per_thread_copy_ahead == 0
