"""A fault of one rank ends the run with one message, or passes; the run goes on from its last checkpoint as before.

The faults are those of `faulty.py`, in runs of two ranks. After each, all ranks have ended by themselves with one exit
code, and no process and no port is left, see `Run.with_fault`.
"""

from __future__ import annotations

import re
import shutil
import socket
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
        """Exit code and output of the run, with a fault in a rank from a step on, counted from 0.

        Raises:
            AssertionError: a process or a port is left, or the ranks have ended with several codes: one was killed.
        """
        words = [fault, str(rank), str(step), *self.words]
        code, output = self.jobs.fork_server.run("tests.e2e.faulty", *words, ranks=2, env=env, seconds=120)
        assert set(self.jobs.fork_server.codes) == {code}, output
        return code, output

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

    def check_message(self, output: str, rank: int, place: str, *, tracebacks: int = 0) -> str:
        """The one message of the run, which names the rank at fault with host and phase; its event says the same.

        Args:
            output: what the run printed.
            rank: rank at fault.
            place: phase and step that the message must name.
            tracebacks: number of tracebacks that Python prints beside it.
        """
        assert output.count("Traceback (most recent call last)") == tracebacks, output
        (message,) = [line for line in output.splitlines() if line.startswith("mvd-scale: ")]
        host = socket.gethostname()
        assert re.search(rf"rank {rank} \(host {re.escape(host)}, pid \d+\)", message), message
        assert len(re.findall(r"rank \d+ \(host", message)) == 1, message
        assert place in message
        (event,) = [event for event in read_events(self.folder / "events.jsonl") if event["event"] == "fault"]
        assert message == f"mvd-scale: {event['message']}"
        assert (event["ranks"], event["hosts"]) == ([rank], [host])
        return message

    def check_continuation(self, undisturbed: dict[int, Reading], *, lost: int = SAVED_EVERY) -> None:
        """The run resumes from its last checkpoint, and has the readings of a run in which nothing failed.

        Args:
            undisturbed: readings of that run.
            lost: largest number of steps after that checkpoint, which are repeated.
        """
        assert max(self.readings) - max(self.saved_steps) <= lost
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


@pytest.mark.parametrize(
    ("fault", "place", "rank"),
    [
        ("loader", "did not leave 'data wait' of step 8", 1),
        ("optimizer", "did not leave 'optimizer' of step 8", 0),
        # A save that never ends is noticed when the next one waits for it.
        ("save", "did not leave 'save' of step 12", 1),
    ],
)
def test_a_rank_that_hangs_ends_the_run(
    fault: str, place: str, rank: int, run: Run, undisturbed: dict[int, Reading]
) -> None:
    run.words += ["--training.hang_minutes", str(HANG_SECONDS / 60)]
    code, output = run.with_fault(fault, rank, step=7)
    assert code == FAULT_CODE, output
    run.check_message(output, rank, place)
    stacks = (run.folder / "faults" / f"rank_{rank}.txt").read_text()
    assert "in block" in stacks
    run.check_continuation(undisturbed, lost=LAST - SAVED_EVERY if fault == "save" else SAVED_EVERY)


def test_a_rank_that_crashes_ends_the_run(run: Run, undisturbed: dict[int, Reading]) -> None:
    code, output = run.with_fault("crash", 1, step=7)
    assert code == 1
    message = run.check_message(output, 1, "failed in 'save' of step 7", tracebacks=1)
    assert message.endswith("ZeroDivisionError: a bug")
    run.check_continuation(undisturbed)


def test_an_error_before_the_data_are_indexed_ends_all_ranks_and_writes_nothing(run: Run) -> None:
    code, output = run.with_fault("crash_in_preparation", 0, step=0)
    assert code == 1
    (message,) = [line for line in output.splitlines() if line.startswith("mvd-scale: ")]
    assert re.search(r"rank 0 \(host .+, pid \d+\) failed in 'prepare': ZeroDivisionError: a bug", message), message
    assert not run.folder.exists()


def test_a_loss_that_is_no_number_skips_the_step_on_all_ranks(run: Run, undisturbed: dict[int, Reading]) -> None:
    code, output = run.with_fault("not_a_number", rank=1, step=7)
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if "changes no weight" in line]
    named = rf"rank 1 \(host {socket.gethostname()}, pid \d+\) are not finite in 'forward' of step 8"
    assert re.search(named, line), line
    (event,) = [event for event in read_events(run.folder / "events.jsonl") if event["event"] == "skip"]
    assert (event["step"], event["ranks"], len(event["clips"])) == (8, [1], event["clip_count"])
    before = range(1, 8)
    assert [run.readings[step] for step in before] == [undisturbed[step] for step in before]
    assert max(run.readings) == LAST


@pytest.mark.parametrize(
    ("fault", "phase"), [("always_not_a_number", "forward"), ("gradients_not_numbers", "backward")]
)
def test_losses_or_gradients_that_stay_no_numbers_end_the_run_with_its_checkpoint(
    fault: str, phase: str, run: Run, undisturbed: dict[int, Reading]
) -> None:
    code, output = run.with_fault(fault, rank=1, step=7)
    assert code == 2
    message = run.check_message(output, 1, f"not finite in '{phase}' of step 11")
    assert "nor were those of the 3 steps before it" in message
    assert run.saved_steps == [SAVED_EVERY]
    run.check_continuation(undisturbed)


def test_a_checkpoint_that_is_being_written_is_completed_before_such_an_end(run: Run) -> None:
    code, output = run.with_fault("slow_disk_and_no_numbers", rank=1, step=SAVED_EVERY - 1)
    assert code == 2
    run.check_message(output, 1, "not finite in 'forward' of step 9")
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
    assert re.search(r"and is replaced: .*; found by rank \d \(host .+, pid \d+\) in 'data wait'", output)
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
    message = run.check_message(output, 0, "failed in 'save' of step 10")
    assert f"no room for checkpoint {run.folder}/checkpoints/step_00000010" in message
    assert run.saved_steps == [SAVED_EVERY]
    (small_disk / "filler").unlink()
    run.check_continuation(undisturbed)


def test_a_disk_that_fails_while_a_checkpoint_is_written(run: Run, undisturbed: dict[int, Reading]) -> None:
    code, output = run.with_fault("failing_disk", 1, step=7)
    assert code == 2
    message = run.check_message(output, 1, "failed in 'save' of step 10: ")
    assert "step_00000010 could not be written" in message
    assert f"the last whole one is {run.folder}/checkpoints/step_00000005" in message
    assert run.saved_steps == [SAVED_EVERY]
    # At the latest it is told when the next checkpoint waits for it, at the last step.
    run.check_continuation(undisturbed, lost=LAST - SAVED_EVERY)
