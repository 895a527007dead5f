"""A run that is asked to stop saves first; a run whose numbers are no longer finite stops on all ranks."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from typing_extensions import Self

from mvd_scale.errors import UserError
from mvd_scale.training.ranks import Ranks

logger = logging.getLogger("mvd_scale")

_WISH, _LAST_STEP = "mvd_scale/stop", "mvd_scale/stop_after"


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1 while it is entered.

    A second Ctrl-C ends the process at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None
        self._last: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, ranks: Ranks, step: int) -> bool:
        """Whether all ranks stop after this step. All ranks ask after every step; no device is waited for.

        Rank 0 names the next step. Every other rank learns of it in time: it cannot end that step without rank 0.
        """
        store = torch.distributed.distributed_c10d._get_default_store()
        if self.received is not None:
            store.set(_WISH, "1")
        if ranks.first and self._last is None and store.check([_WISH]):
            store.set(_LAST_STEP, str(step + 1))
        if self._last is None and store.check([_LAST_STEP]):
            self._last = int(store.get(_LAST_STEP))
        return self._last is not None and step >= self._last

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # The launcher answers a Ctrl-C, which the terminal sends to everybody, with a SIGTERM to the ranks.
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that ended by the signal."""
        return 128 + (self.received or signal.SIGTERM)


@contextmanager
def exit_when_stopped() -> Iterator[None]:
    """End the process with the exit code of a run that was asked to stop."""
    try:
        yield
    except Stopped as stop:
        logger.info("stopped as asked, after saving; the same command goes on from here")
        sys.exit(stop.exit_code)


class Stopped(Exception):
    """The run ended before its last step because it was asked to; it was saved and can be resumed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def check_finite(engine: Any, precision: str, step: int) -> None:
    """Stop when DeepSpeed skipped a step: it looks at the gradients of all ranks and skips on all or on none.

    In fp16 skipped steps are how the loss scale is found; DeepSpeed itself stops at the smallest scale.

    Raises:
        UserError: on every rank alike. No weight was touched by the step.
    """
    if precision != "fp16" and engine.skipped_steps:
        raise UserError(
            f"the gradients of step {step} are not finite on at least one rank; the weights were left as they were. "
            "Start the same command again to resume from the last checkpoint, with a smaller `--training.base_lr` "
            "or `--training.clip_grad 1` in a new run if it happens again"
        )
