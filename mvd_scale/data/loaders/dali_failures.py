"""Clips that DALI failed to decode though PyAV decodes them, and the kinds of videos that PyAV therefore decodes.

An error of DALI ends the graph: it is built anew without the clips that failed, which takes seconds. For a data set
that DALI does not like this would happen again and again. So a kind of videos of which `LIMIT` clips failed within
`HORIZON` steps goes to PyAV for good.

From which step on is a pure function of the clips that failed, so that it is the same on all ranks and after a resume:

    steps  0 1 2 3 | 4 5 6 7 | 8 9 ...
    window    0    |    1    |   2
              '- failures of window 0 are exchanged after it, and count from the start of window 2 on

A rank does not wait for the others: when it reaches window 2, they have finished window 0 long since, because every
step needs all ranks. Each failure is appended to a file as well, which a resumed run reads.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from mvd_scale.data.decoding.backends import DaliDevice, VideoKind

if TYPE_CHECKING:  # `mvd-scale status` reads the name of the file without waiting for torch
    from mvd_scale.distributed.data_rank import Exchange

FAILURES_FILE = "dali_failures.jsonl"
"""Name of the file that records the failures of a run, in the folder of the run."""

WINDOW = 4
"""Steps after which ranks exchange their failures."""

LIMIT = 4
"""Number of failed clips of a kind, within `HORIZON` steps, from which on PyAV decodes the kind."""

HORIZON = 100
"""Number of steps in which `LIMIT` clips must fail. Single videos that DALI does not decode, which any large data set
has, cost one new graph each and leave the rest of their kind to DALI."""


class DaliFailures:
    """Record of the clips that DALI failed to decode.

    Args:
        device: device on which DALI decodes; failures on the other device do not count.
        step: first step that the loader loads.
        file: file that records the failures of all ranks, one JSON line each; None to forget them.
        exchange: exchange with the other ranks; None if the loader stands alone.
    """

    def __init__(
        self, device: DaliDevice, step: int, file: Path | None = None, exchange: Exchange | None = None
    ) -> None:
        self._device = device
        self._file = file
        self._exchange = exchange
        self._first = self._window = step // WINDOW
        self._clips: dict[int, tuple[int, VideoKind]] = {}
        self._mine: dict[int, list[str]] = defaultdict(list)
        if file is not None and file.is_file():
            self._read(file.read_text(encoding="utf-8").splitlines())

    def add(self, clip: int, step: int, kind: VideoKind) -> None:
        """Record a clip that DALI failed to decode.

        Args:
            clip: number of the clip in the stream.
            step: step to which it belongs; not before the step of the last call of `advance`.
            kind: kind of its video.
        """
        line = json.dumps({"clip": clip, "step": step, "device": self._device, "kind": kind})
        known = clip in self._clips
        self._read([line])
        self._mine[step // WINDOW].append(line)
        if self._file is not None and not known:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def advance(self, step: int) -> None:
        """Exchange the failures of finished windows with the other ranks, when the loader reaches a step."""
        while self._window < step // WINDOW:
            self._window += 1
            if self._exchange is None:
                continue
            finished = self._window - 1
            self._exchange.post(f"window {finished}", self._mine.pop(finished, []))
            if finished - 1 >= self._first:
                self._read(self._exchange.collect(f"window {finished - 1}"))

    def kinds(self) -> frozenset[VideoKind]:
        """Kinds of videos that PyAV decodes in the window of the last call of `advance`."""
        steps: dict[VideoKind, list[int]] = defaultdict(list)
        for step, kind in self._clips.values():
            if step // WINDOW <= self._window - 2:
                steps[kind].append(step)
        return frozenset(kind for kind, found in steps.items() if _are_frequent(sorted(found)))

    def _read(self, lines: list[str]) -> None:
        for line in lines:
            failure = json.loads(line)
            if failure["device"] == self._device:
                self._clips[failure["clip"]] = failure["step"], VideoKind(*failure["kind"])


def _are_frequent(steps: list[int]) -> bool:
    """Whether `LIMIT` of the given steps, ascending, lie within `HORIZON`."""
    return any(last - first < HORIZON for first, last in zip(steps, steps[LIMIT - 1 :], strict=False))
