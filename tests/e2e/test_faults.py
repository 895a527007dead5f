"""A fault of one rank ends the run with one message, or passes; the run goes on from its last checkpoint as before.

The faults are those of `faulty.py`, in runs of two ranks.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mvd_scale.errors import FAULT_CODE
from mvd_scale.utils.events import read_events
from mvd_scale.utils.io import read_metrics
from tests.fork_server import ForkServer

from .conftest import RECIPE, Jobs

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SAVED_EVERY, LAST = 5, 12
HANG_SECONDS = 8
"""Limit of the watchdog where a test waits for it; longer than a busy machine lets a rank wait for its turn."""

Reading = tuple[float, float, float]


class Run:
    """A tiny run of two ranks, in which faults can be injected.

    Args:
        jobs: starter of commands.
        folder: folder of the run.
        words: command and recipe.
    """

    def __init__(self, jobs: Jobs, folder: Path, words: Sequence[str | Path]) -> None:
        self.jobs = jobs
        self.folder = folder
        self.words = [*words, "--run.folder", folder, "--training.max_steps", str(LAST)]

    def with_fault(self, fault: str, rank: int, step: int, **env: str) -> tuple[int, str]:
        """Exit code and output of the run, with a fault in a rank from a step on, counted from 0."""
        words = [fault, str(rank), str(step), *self.words]
        return self.jobs.fork_server.run("tests.e2e.faulty", *words, ranks=2, env=env, seconds=120)

    def without_fault(self) -> tuple[int, str]:
        """Exit code and output of the run."""
        return self.jobs.run(*self.words, ranks=2)

    @property
    def readings(self) -> dict[int, Reading]:
        """Loss, norm of the gradients and learning rate by optimizer step."""
        rows = read_metrics(self.folder / "metrics.jsonl")
        return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in rows}

    @property
    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints."""
        names = [path.name.removeprefix("step_") for path in (self.folder / "checkpoints").glob("step_*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def check_continuation(self, undisturbed: dict[int, Reading]) -> None:
        """The run resumes from its last checkpoint, and has the readings of a run in which nothing failed."""
        code, output = self.without_fault()
        assert code == 0, output
        assert "resumed from" in output
        assert self.readings == undisturbed


@pytest.fixture(scope="module")
def words(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    recipe = tmp_path_factory.mktemp("faults") / "tiny.yaml"
    recipe.write_text(RECIPE)
    return ["pretrain", "--recipe", recipe, "--data.source", clips]


@pytest.fixture(scope="module")
def undisturbed(
    fork_server: ForkServer, words: list[str | Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Reading]:
    run = Run(Jobs(fork_server), tmp_path_factory.mktemp("undisturbed") / "run", words)
    code, output = run.without_fault()
    assert code == 0, output
    return run.readings


@pytest.fixture
def run(jobs: Jobs, words: list[str | Path], tmp_path: Path) -> Run:
    return Run(jobs, tmp_path / "run", words)


def messages(output: str) -> list[str]:
    """Errors that the ranks printed."""
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("mvd-scale: ")]


@pytest.mark.parametrize(
    ("fault", "phase", "rank"), [("loader", "data wait", 1), ("optimizer", "optimizer", 0), ("save", "save", 1)]
)
def test_a_rank_that_hangs_ends_the_run(
    fault: str, phase: str, rank: int, run: Run, undisturbed: dict[int, Reading]
) -> None:
    # A save that never ends is noticed when the next one waits for it.
    run.words += ["--training.hang_minutes", str(HANG_SECONDS / 60)]
    code, output = run.with_fault(fault, rank, step=7)
    assert code == FAULT_CODE, output
    (message,) = messages(output)
    assert f"rank {rank} (" in message
    assert f"did not leave {phase!r}" in message
    stacks = (run.folder / "faults" / f"rank_{rank}.txt").read_text()
    assert "in block" in stacks
    (event,) = [event for event in read_events(run.folder / "events.jsonl") if event["event"] == "fault"]
    assert event["message"] in message
    run.check_continuation(undisturbed)


def test_a_rank_that_crashes_ends_the_run(run: Run, undisturbed: dict[int, Reading]) -> None:
    code, output = run.with_fault("crash", 1, step=7)
    assert code == 1
    assert output.count("Traceback (most recent call last)") == 1, output
    assert "ZeroDivisionError: a bug" in output
    run.check_continuation(undisturbed)


def test_a_loss_that_is_no_number_skips_the_step_on_all_ranks(run: Run, undisturbed: dict[int, Reading]) -> None:
    code, output = run.with_fault("not_a_number", rank=1, step=7)
    assert code == 0, output
    assert "the loss of rank 1 is not finite" in output
    (event,) = [event for event in read_events(run.folder / "events.jsonl") if event["event"] == "skip"]
    assert (event["step"], event["ranks"], len(event["clips"])) == (7, [1], event["clip_count"])
    before = range(1, 8)
    assert [run.readings[step] for step in before] == [undisturbed[step] for step in before]
    assert max(run.readings) == LAST


def test_losses_that_stay_no_numbers_end_the_run_with_its_checkpoint(run: Run, undisturbed: dict[int, Reading]) -> None:
    code, output = run.with_fault("always_not_a_number", rank=1, step=7)
    assert code == 2
    (message,) = messages(output)
    assert "the gradients of step 10 are not finite on at least one rank, nor those of the 3 steps before" in message
    assert run.saved_steps == [SAVED_EVERY]
    run.check_continuation(undisturbed)


def test_a_checkpoint_that_is_being_written_is_completed_before_such_an_end(run: Run) -> None:
    code, output = run.with_fault("slow_disk_and_no_numbers", rank=1, step=SAVED_EVERY - 1)
    assert code == 2
    (message,) = messages(output)
    assert "the gradients of step 8 are not finite" in message
    assert run.saved_steps == [SAVED_EVERY]


def test_a_clock_that_is_set_back_changes_nothing(run: Run, undisturbed: dict[int, Reading]) -> None:
    code, output = run.with_fault("clock", rank=0, step=7)
    assert code == 0, output
    assert run.readings == undisturbed


def test_videos_that_vanish_are_replaced_and_named(run: Run, clips: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(clips, tmp_path / "videos")
    gone = sorted(videos.glob("*"))[:3]
    run.words += ["--data.source", videos, "--data.max_broken", "1"]
    code, output = run.with_fault("vanished_videos", rank=0, step=2, VIDEOS=str(videos))
    assert code == 0, output
    assert max(run.readings) == LAST
    named = {path.name for path in gone if path.name in output}
    assert named
    assert all(name in (run.folder / "quarantine.jsonl").read_text() for name in named)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """File system of 100 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_seen_before_a_checkpoint_is_written(
    small_disk: Path, jobs: Jobs, words: list[str | Path], undisturbed: dict[int, Reading]
) -> None:
    run = Run(jobs, small_disk / "run", words)
    code, output = run.with_fault("full_disk", rank=0, step=7, DISK=str(small_disk))
    assert code == 2
    (message,) = messages(output)
    assert f"no room for checkpoint {run.folder}/checkpoints/step_00000010" in message
    assert run.saved_steps == [SAVED_EVERY]
    (small_disk / "filler").unlink()
    run.check_continuation(undisturbed)


def test_a_disk_that_fails_while_a_checkpoint_is_written(run: Run, undisturbed: dict[int, Reading]) -> None:
    code, output = run.with_fault("failing_disk", 1, step=7)
    assert code == 2
    (message,) = messages(output)
    assert "step_00000010 could not be written" in message
    assert f"the last whole one is {run.folder}/checkpoints/step_00000005" in message
    assert run.saved_steps == [SAVED_EVERY]
    run.check_continuation(undisturbed)
