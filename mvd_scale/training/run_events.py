"""Events of the start and the end of a run's processes; the others are written where they happen."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from mvd_scale import __version__
from mvd_scale.config import RunRecipe
from mvd_scale.config.deepspeed import zero_stage
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import FAULT_CODE, Preempted, UserError, is_device_fault
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.utils.events import EventLog
from mvd_scale.utils.io import last_metrics

_MAX_MESSAGE = 2000
"""Characters of an error's message that the event `end` holds."""


def record_start(folder: RunFolder, recipe: RunRecipe, schedule: Schedule, ranks: Ranks) -> None:
    """Write the event `start`: hosts, ranks, batch and number of steps. All ranks must call it."""

    def write(hosts: list[str]) -> None:
        folder.started = True
        micro, accumulation = recipe.micro_batch_and_accumulation(ranks.world_size)
        EventLog(folder.events).write(
            "start",
            steps=schedule.last_step,
            steps_per_epoch=schedule.steps_per_epoch,
            ranks=ranks.world_size,
            hosts=dict(Counter(hosts)),
            device=ranks.device.type,
            precision=recipe.training.precision,
            zero_stage=zero_stage(recipe),
            global_batch=recipe.training.global_batch,
            micro_batch=micro,
            accumulation=accumulation,
            version=__version__,
        )

    ranks.open_exchange().decide("hosts", socket.gethostname(), write)


@contextmanager
def recording_end(folder: RunFolder) -> Iterator[None]:
    """Write the event `end` after a `with` block, and release the folder.

    Does nothing on ranks other than 0, where the folder was not claimed, and if the run was finished before.
    """
    try:
        yield
    except BaseException as error:
        _record_end(folder, *describe_end(error))
        raise
    else:
        if folder.started:
            _record_end(folder, "finished", "", 0)
    finally:
        folder.release()


def describe_end(error: BaseException) -> tuple[str, str, int]:
    """Describe the end of a run by an exception.

    Returns:
        `stopped` (by a signal, after a checkpoint), `invalid` or `error`; the message; and the exit code.
    """
    message = str(error)[:_MAX_MESSAGE]
    if isinstance(error, Preempted):
        return "stopped", "", error.exit_code
    if isinstance(error, (UserError, OSError)):
        return "invalid", message, 2
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "a second Ctrl-C", 130
    return "error", f"{type(error).__name__}: {message}", FAULT_CODE if is_device_fault(error) else 1


def _record_end(folder: RunFolder, reason: str, message: str, exit_code: int) -> None:
    if folder.lease is None:
        return
    reading = last_metrics(folder.metrics)
    step = reading["step"] if reading else 0
    EventLog(folder.events).write("end", reason=reason, message=message, exit_code=exit_code, step=step)
