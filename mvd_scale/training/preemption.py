"""Stop requests by signals, after which a run saves a checkpoint before it ends."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from mvd_scale.distributed.health.verdict import Member
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import Preempted

logger = logging.getLogger("mvd_scale")

_WISH, _LAST_STEP = "mvd_scale/stop", "mvd_scale/stop_after"

_READERS = 256
"""Ranks that read the store after a step: at 12 microseconds each they keep it busy for 3 ms."""


class PreemptionHandler:
    """Context manager that records SIGTERM, SIGINT and SIGUSR1, so that a run can save a checkpoint before it ends.

    A second Ctrl-C ends the process immediately.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None
        self._last: int | None = None
        self._number: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def should_stop(self, ranks: Ranks, step: int) -> bool:
        """Whether all ranks stop after this step. All ranks must call it after every step; does not synchronise.

        Rank 0 announces in the store that the run ends after the next step, and by which signal. Every other rank reads
        it in time, because it cannot finish that step without rank 0. In jobs of more than `_READERS` ranks, so many
        ranks read the store after a step, in turn, and the run ends when all have read it.
        """
        store, turns = ranks.store, -(-ranks.world_size // _READERS)
        if self.received is not None:
            store.set(_WISH, f"{self.received} {Member.own(ranks.rank).name}")
        if ranks.is_main and self._last is None and store.check([_WISH]):
            number, _, who = store.get(_WISH).decode().partition(" ")
            store.set(_LAST_STEP, f"{step + turns} {number}")
            asked, last = signal.Signals(int(number)).name, step + turns + 1
            logger.info("%s received %s by step %d: the run ends after step %d", who, asked, step + 1, last)
        if self._last is None and (ranks.is_main or (step + ranks.rank) % turns == 0) and store.check([_LAST_STEP]):
            self._last, self._number = map(int, store.get(_LAST_STEP).split())
        return self._last is not None and step >= self._last

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Only a second SIGINT counts: after a Ctrl-C, which the terminal sends to all processes, the launcher sends
        # SIGTERM to the ranks.
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    @property
    def exit_code(self) -> int:
        """Exit code that a shell reports for a process that the signal ended: 128 + its number, on all ranks."""
        return 128 + (self._number or self.received or signal.SIGTERM)


@contextmanager
def exit_on_preemption() -> Iterator[None]:
    """Convert `Preempted` in a `with` block to the end of the process with its exit code."""
    try:
        yield
    except Preempted as stop:
        logger.info("stopped on request after saving a checkpoint; the same command resumes from it")
        sys.exit(stop.exit_code)
