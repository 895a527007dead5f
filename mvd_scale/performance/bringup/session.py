"""A stage in progress: makes its checks one after the other and appends events for each to a file."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from mvd_scale.performance.bringup.results import CheckResult, Figures

HANG = 30.0
"""Least seconds until a check counts as hung."""

PATIENCE = 3.0
"""Multiple of its expected seconds after which a check counts as hung."""

SHARED = 10
"""Factor on the time until a check of a dry run counts as hung: its CPUs may have other work."""

_DETAILS = 30
"""Lines of a traceback that are kept."""


class CheckFailed(Exception):
    """A promise that the machine does not keep."""


class LeftOut(Exception):
    """Reason why a check or a stage cannot be made on this machine."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of the process of a stage."""

    module: str
    needs: tuple[str, ...]
    needs_gpu: bool
    device: str

    events: str
    """File to append events to, as JSON lines."""

    deadline: float
    """Time of `time.monotonic` at which the stage's budget ends."""

    done: tuple[str, ...]
    """Names of the checks that an earlier process of this stage has made, or died of."""

    folder: str
    """Folder for files of this stage, which exists."""


class Check:
    """Check in progress: collects its figures."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures

    def figure(self, name: str, value: float | str) -> None:
        """Record a figure, which the result shows whether the check passes or not."""
        # JSON has no infinity and no NaN.
        self.figures[name] = str(value) if isinstance(value, float) and not isfinite(value) else value

    def expect(self, kept: bool, promise: str) -> None:
        """Fail the check if a promise is not kept.

        Raises:
            CheckFailed: `kept` is false.
        """
        if not kept:
            raise CheckFailed(promise)


class Session:
    """Stage in progress.

    Args:
        arguments: arguments of the process.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.device = arguments.device
        self.folder = Path(arguments.folder)
        """Folder for files; it is the same one after a crash."""
        self._arguments = arguments

    @property
    def small(self) -> bool:
        """Whether this is a dry run on the CPU, with small sizes and few cases."""
        return self.device == "cpu"

    @property
    def remaining(self) -> float:
        """Seconds that are left of the stage's budget."""
        return self._arguments.deadline - time.monotonic()

    def made(self, name: str) -> bool:
        """Whether an earlier process of this stage has made a check, or died of it."""
        return name in self._arguments.done

    def tell(self, event: str, **values: Any) -> None:
        """Append an event for the runner."""
        with open(self._arguments.events, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def check(
        self, name: str, work: Callable[[Check], None], seconds: float = 10.0, limit: float | None = None
    ) -> bool:
        """Make a check, unless the stage's budget is spent, and return whether it passed.

        Args:
            name: name of the check, unique in the stage.
            work: function that makes it: records figures, and raises `LeftOut`, or any other exception as a failure.
            seconds: expected time; the check is left out if less is left.
            limit: seconds after which it counts as hung; None for `PATIENCE` times the expected ones, `HANG` at least.
        """
        if self.made(name):
            return False
        if self.remaining < seconds:
            reason = f"{max(self.remaining, 0):.0f} s of the stage's time are left, and it takes up to {seconds:.0f} s"
            self._end(CheckResult(name, "left out", reason=reason))
            return False
        limit = max(HANG, PATIENCE * seconds) if limit is None else limit
        self.tell("begin", name=name, limit=limit * (SHARED if self.small else 1))
        result, started = CheckResult(name, "passed"), time.monotonic()
        try:
            work(Check(result.figures))
            settle()
        except LeftOut as reason:
            result.outcome, result.reason = "left out", str(reason)
        # A check may fail in any way: that is what it is for.
        except Exception as error:
            said = str(error).strip().splitlines()
            result.outcome, result.reason = "failed", f"{type(error).__name__}: {said[0] if said else ''}"
            result.details = "\n".join(traceback.format_exc().splitlines()[-_DETAILS:])
        result.seconds = time.monotonic() - started
        self._end(result)
        if result.outcome == "failed":
            self._end_if_broken()
        return result.outcome == "passed"

    def _end(self, result: CheckResult) -> None:
        self.tell("end", **asdict(result))

    def _end_if_broken(self) -> None:
        """End the process if the GPU reports an error that stays: every later call of this process would fail."""
        try:
            settle()
        except Exception as error:
            print(f"the GPU's context is broken, the stage goes on in another process: {error}", file=sys.stderr)
            self.tell("broken")
            sys.exit(1)


def settle() -> None:
    """Wait for the GPU, so that errors and time of a check's kernels are its own."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
