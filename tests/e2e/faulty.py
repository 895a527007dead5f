"""`mvd-scale` with a fault in one rank: `python -m tests.e2e.faulty FAULT RANK STEP ARGUMENTS...`.

The fault begins on rank RANK with optimizer step STEP, counted from 0: the name of a function of this module. With
`supervise` among ARGUMENTS it is one of the supervised ranks. If `FAULT_ONCE` names a file, the fault makes it as it
begins, and does not come once it is there: not again after a restart.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvd_scale.cli import main
from mvd_scale.data.loaders.clip_loader import ClipLoader
from mvd_scale.elastic.command import SupervisedCommand
from mvd_scale.training.checkpointing.writer import CheckpointWriter
from mvd_scale.training.run import TrainingJob
from mvd_scale.training.trainer import Trainer

FILE_BYTES = 50_000
"""Size at which files cannot grow any more in `failing_disk`: larger than logs, smaller than a checkpoint."""

FREE_BYTES = 2**20
"""Room that `full_disk` leaves."""


def block(*_: Any) -> Any:
    """Wait for ever, as for a disk or a lock that never comes."""
    while True:
        time.sleep(1)


def loader(trainer: Trainer) -> None:
    """The loader never returns the next batch."""
    ClipLoader.__next__ = block  # type: ignore[method-assign]


def optimizer(trainer: Trainer) -> None:
    """The optimizer's step never ends, before it talks to the other ranks."""
    type(trainer.models[0].engine).step = block


def save(trainer: Trainer) -> None:
    """The thread that writes checkpoints never ends."""
    CheckpointWriter._write = block  # type: ignore[method-assign]


def crash(trainer: Trainer) -> None:
    """An error of the program."""
    raise ZeroDivisionError("a bug")


def crash_in_preparation(*_: Any) -> None:
    """An error of the program before the data are indexed; the step of the fault is not read."""
    raise ZeroDivisionError("a bug")


def not_a_number(trainer: Trainer) -> None:
    """The loss of this step is not a number."""
    model = trainer.models[0]
    objective = model.objective

    def spoiled(engine: Any, batch: Any) -> Any:
        model.objective = objective
        loss, parts = objective(engine, batch)
        return loss * float("nan"), parts

    spoiled.parts, spoiled.teachers = objective.parts, objective.teachers  # type: ignore[attr-defined]
    model.objective = spoiled  # type: ignore[assignment]


def gradients_not_numbers(trainer: Trainer) -> None:
    """The gradient of one parameter is not a number in this step and all that follow, while the losses are numbers."""
    weights = [weight for weight in trainer.models[0].engine.module.parameters() if weight.requires_grad]
    weights[len(weights) // 2].register_hook(lambda gradient: gradient * float("nan"))


def always_not_a_number(trainer: Trainer) -> None:
    """The loss of this step and of all that follow is not a number."""
    model = trainer.models[0]
    objective = model.objective

    def spoiled(engine: Any, batch: Any) -> Any:
        loss, parts = objective(engine, batch)
        return loss * float("nan"), parts

    spoiled.parts, spoiled.teachers = objective.parts, objective.teachers  # type: ignore[attr-defined]
    model.objective = spoiled  # type: ignore[assignment]


def killed(trainer: Trainer) -> None:
    """The process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def not_a_number_and_later_killed(trainer: Trainer) -> None:
    """The loss of this step is not a number, of the first of several students; 9 steps later the process is killed."""
    not_a_number(trainer)
    inject(killed, trainer.step + 9)


def slow_disk_and_no_numbers(trainer: Trainer) -> None:
    """Checkpoints take 8 s longer, and from the next step on the losses are not numbers."""
    write = CheckpointWriter._write

    def slow(*arguments: Any) -> None:
        time.sleep(8)
        write(*arguments)

    CheckpointWriter._write = slow  # type: ignore[method-assign]
    inject(always_not_a_number, trainer.step + 1)


def clock(trainer: Trainer) -> None:
    """The clock of the host is set back by a day."""
    now = time.time
    time.time = lambda: now() - 86_400


def full_disk(trainer: Trainer) -> None:
    """A file fills the disk of the folder `DISK`, but for a little room for logs."""
    folder = Path(os.environ["DISK"])
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - FREE_BYTES)


def failing_disk(trainer: Trainer) -> None:
    """No file can grow beyond `FILE_BYTES`, so that writing a checkpoint fails when it has begun."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def vanished_videos(trainer: Trainer) -> None:
    """Three videos are deleted."""
    for video in sorted(Path(os.environ["VIDEOS"]).glob("*"))[:3]:
        video.unlink()


def inject(fault: Callable[[Trainer], None], step: int) -> None:
    """Let a fault begin with an optimizer step."""
    train_step, mark = Trainer.train_step, os.environ.get("FAULT_ONCE")

    def faulty(trainer: Trainer) -> Any:
        if trainer.step == step and not (mark and Path(mark).exists()):
            if mark:
                Path(mark).touch()
            fault(trainer)
        return train_step(trainer)

    Trainer.train_step = faulty  # type: ignore[method-assign]


def command_of_rank(command: SupervisedCommand) -> list[str]:
    """Command of a supervised rank, with the fault of this process."""
    return [sys.executable, "-m", "tests.e2e.faulty", *FAULT, *command.words]


if __name__ == "__main__":
    FAULT = name, rank, first = sys.argv[1:4]
    del sys.argv[1:4]
    if "supervise" in sys.argv:
        SupervisedCommand.command = property(command_of_rank)  # type: ignore[method-assign,assignment]
    elif os.environ.get("RANK", "0") == rank and name == "crash_in_preparation":
        TrainingJob.prepare = crash_in_preparation  # type: ignore[method-assign]
    elif os.environ.get("RANK", "0") == rank:
        inject(globals()[name], int(first))
    main()
