"""Findings of checks, and checks that end by a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

Outcome = Literal["ok", "warning", "fail", "left out"]
"""`ok`: as a run needs it. `warning`: a run works, but slower or with a risk. `fail`: a run would fail or go wrong.
`left out`: it cannot be checked here."""

Group = Literal["hosts", "versions", "machine", "gpus", "network", "folder", "decoding"]
"""Groups of checks, in the order of the table."""

GROUPS: tuple[Group, ...] = get_args(Group)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """Result of one check on one host, or on all of them together."""

    check: str
    """Name of the check, the same on all hosts."""

    outcome: Outcome
    detail: str

    remedy: str = ""
    """How to mend it: every `fail` and `warning` has one."""

    figures: dict[str, Any] = field(default_factory=dict)
    """Measured values, serialisable as JSON."""

    host: str = ""
    """Label of the host; empty for all hosts together."""

    group: str = ""

    def __post_init__(self) -> None:
        """Check that a fault comes with its remedy.

        Raises:
            ValueError: it does not.
        """
        if self.outcome in ("fail", "warning") and not self.remedy:
            raise ValueError(f"the finding {self.check!r} has no remedy")


class TimeLimit(Exception):
    """Work that has not ended in its time."""


@dataclass(frozen=True)
class HostCheck:
    """Check of a host."""

    group: Group
    name: str

    make: Callable[[], Iterable[Finding]]
    """Function that makes it. Any exception is a failure."""

    seconds: float
    """Time limit."""

    hung: str
    """Remedy where it does not end in its time."""

    def findings(self) -> list[Finding]:
        """Make the check, and return at the latest when its time ends."""
        try:
            return within(self.seconds, lambda: list(self.make()))
        except TimeLimit as limit:
            return [Finding(self.name, "fail", str(limit), self.hung, {"hung": True})]
        # A check may fail in any way: a damaged package, a driver, a file system.
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            detail = f"the check ended by {type(error).__name__}: {said}"
            return [
                Finding(self.name, "fail", detail, "mend what the message names; `mvd-scale --debug env` says more")
            ]


_THREAD = "mvd-doctor check"


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """Run a function in a thread and return its result, or raise its exception.

    A thread cannot be ended: one that hangs is left behind, see `hanging`.

    Raises:
        TimeLimit: it has not ended after `seconds`.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=_THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    if errors:
        raise errors[0]
    raise TimeLimit(f"no answer within {seconds:g} s")


def hanging() -> bool:
    """Whether a check was left behind, which may hold up the usual end of the process."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
