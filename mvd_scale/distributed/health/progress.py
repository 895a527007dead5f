"""Progress of one rank, by which the watchdog tells a rank that works from one that hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

FIRST_STEP_PATIENCE = 6
"""Patience with the first step of a process, which may compile kernels: half an hour with the default limit."""

WRITING_PATIENCE = 3
"""Patience with the writing of a checkpoint beside the training: flushing one large file to a slow disk shows no
progress. A quarter of an hour with the default limit."""


class Position(NamedTuple):
    """Place of a rank in its run."""

    arrivals: int
    """Number of phases entered so far. All ranks enter the same phases, so that the rank with the smallest number is
    the one that the others wait for."""

    collectives: int
    """Number of collective operations begun so far. Of ranks in one phase, those with the smallest number are the ones
    that the others wait for."""

    ticks: int
    """Number of signs of progress within phases."""

    patience: int
    """Factor on the time without progress that is allowed; 0 for any time, as while data are indexed."""

    step: int
    """Number of completed optimizer steps."""

    phase: str
    """Name of the phase."""

    parts: int = 0
    """Number of checkpoints of which this rank has written its part, beside its phases. Of ranks in one phase that have
    begun as many collectives, those with the smallest number are the ones that the others wait for."""

    pieces: int = 0
    """Number of tensors that this rank has written to checkpoints."""

    writing: int = 0
    """Step of the checkpoint that this rank is writing beside its phases; 0 if it writes none. Rank 0 writes until the
    checkpoint is complete, the others until their part is on disk."""

    def __str__(self) -> str:
        counts = (*self[:5], self.parts, self.pieces, self.writing)
        return f"{' '.join(map(str, counts))} {self.phase}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Convert the text of a position back."""
        *counts, phase = text.split(" ", 8)
        arrivals, collectives, ticks, patience, step, *writer = map(int, counts)
        return cls(arrivals, collectives, ticks, patience, step, phase, *writer)

    @property
    def written(self) -> tuple[int, int, int]:
        """Progress of the writing of checkpoints."""
        return self.parts, self.pieces, self.writing

    @property
    def description(self) -> str:
        """Phase and step for messages; the step that runs is the one after the completed ones."""
        return f"{self.phase!r} of step {self.step + 1}" if self.patience else f"{self.phase!r}"


class Progress:
    """Progress of this rank. The main thread enters phases, any thread may tick; the watchdog reads."""

    def __init__(self) -> None:
        self._entered = Position(0, 0, 0, patience=0, step=0, phase="start")
        # Of its own: a thread that ticks must not put a phase back that the main thread has left meanwhile.
        self._ticks = self._parts = self._pieces = 0
        self._writing: dict[object, int] = {}
        # The checkpoints of several students are written by as many threads.
        self._lock = threading.Lock()

    @property
    def position(self) -> Position:
        """Place of this rank."""
        with self._lock:
            writing = min(self._writing.values(), default=0)
        return self._entered._replace(ticks=self._ticks, parts=self._parts, pieces=self._pieces, writing=writing)

    def enter(self, phase: str, step: int | None = None, *, patience: int = 1) -> None:
        """Record that this rank begins a phase.

        Args:
            phase: name of the phase.
            step: number of completed optimizer steps; None if it has not changed.
            patience: factor on the time without progress that is allowed; 0 for any time.
        """
        old = self._entered
        step = old.step if step is None else step
        self._entered = Position(old.arrivals + 1, 0, 0, patience, step, phase)

    def tick(self) -> None:
        """Record progress within a phase that takes long, such as the batches of a validation."""
        self._ticks += 1

    def begin_writing(self, writer: object, step: int) -> None:
        """Record that a writer begins to write the checkpoint after `step` optimizer steps, beside the phases."""
        with self._lock:
            self._writing[writer] = step

    def count_piece(self) -> None:
        """Record that this rank has written a tensor to a checkpoint."""
        with self._lock:
            self._pieces += 1

    def count_part(self) -> None:
        """Record that this rank has written its part of a checkpoint."""
        with self._lock:
            self._parts += 1

    def end_writing(self, writer: object) -> None:
        """Record that no other rank waits for a writer any more, which may have been recorded before."""
        with self._lock:
            self._writing.pop(writer, None)

    @contextmanager
    def passing(self, phase: str, *, patience: int = 0) -> Iterator[None]:
        """Run a `with` block as a phase, by default of unlimited length, and return to the phase before it."""
        before = self._entered
        self.enter(phase, patience=patience)
        try:
            yield
        finally:
            self.enter(before.phase, patience=before.patience)
