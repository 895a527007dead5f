"""Loaders timed in turns, so that a machine whose speed drifts does not decide between them.

Each loader has a process of its own, which is stopped (SIGSTOP) with its workers while another has its turn. A loader
continues where it was stopped, with as many batches in advance, so that nothing is prepared outside its turns. In each
round every loader has one turn, and another one begins. Loaders are compared within a round.

A loader that fails, aborts or hangs is left out with one line that says why; the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from mvd_scale.performance.benchmarks.timing import cpu_seconds

PATIENCE = 120.0
"""Seconds after which a loader that has not answered counts as hanging."""

Work = Callable[[], Generator[Any]]
"""Picklable function that opens a loader and yields its batches without end."""

Check = Callable[[Any], None]
"""Picklable function that raises ValueError if the first batch is not what all loaders must yield."""


class Turn(NamedTuple):
    """One turn of a loader."""

    batches: int
    seconds: float
    cpu: float
    """CPU seconds of the loader's process and its workers."""


class LoaderFailed(Exception):
    """A loader failed, with the reason in one line."""


@dataclass
class Contest:
    """Turns of all loaders, and the reasons why some have none."""

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def take_turns(
    loaders: dict[str, tuple[Work, Check]], *, rounds: int, seconds: float, say: Callable[[str], None]
) -> Contest:
    """Time loaders in rounds.

    Args:
        loaders: loaders by name, and the checks of their first batches.
        rounds: number of turns of each loader.
        seconds: least length of a turn in seconds.
        say: called with a line after each loader has been opened and after each round.
    """
    contest, running = Contest(), dict[str, LoaderProcess]()
    try:
        for name, (work, check) in loaders.items():
            say(f"opening {name}")
            with _left_out(name, contest, running, say):
                running[name] = LoaderProcess(work, check)
                running[name].wait_until_open()
        for number in range(rounds):
            for name in order_of_round([*loaders], number):
                if name in running:
                    with _left_out(name, contest, running, say):
                        contest.turns.setdefault(name, []).append(running[name].take_turn(seconds))
            say(f"round {number + 1} of {rounds}: {_rates(contest)}")
    finally:
        for process in running.values():
            process.close()
    return contest


def order_of_round(names: Sequence[str], number: int) -> list[str]:
    """Order of the turns of a round: each round begins with the next name."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


class LoaderProcess:
    """Loader in a process of its own, in a process group with its workers, stopped except in its turns."""

    def __init__(self, work: Work, check: Check) -> None:
        # Processes that are forked from one that has imported torch and DALI, and used neither, start at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mvd_scale.performance.benchmarks.data.data_loading"])
        self._connection, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, work, check))
        self._process.start()
        end.close()

    def wait_until_open(self) -> None:
        """Wait until the first batch has been drawn and checked.

        Raises:
            LoaderFailed: the loader failed, aborted or hangs, or its batch is wrong.
        """
        self._receive()
        self._signal(signal.SIGSTOP)

    def take_turn(self, seconds: float) -> Turn:
        """Let the loader draw batches for at least `seconds`.

        Raises:
            LoaderFailed: the loader failed, aborted or hangs.
        """
        try:
            self._connection.send(seconds)
        except OSError:
            raise self._ended() from None
        self._signal(signal.SIGCONT)
        turn: Turn = self._receive(PATIENCE + seconds)
        self._signal(signal.SIGSTOP)
        return turn

    def close(self) -> None:
        """End the process and its workers."""
        with suppress(OSError):
            self._connection.send(None)
        self._signal(signal.SIGCONT)
        self._process.join(10)
        self._signal(signal.SIGKILL)
        self._process.join()

    def _receive(self, patience: float = PATIENCE) -> Any:
        # Workers that outlive the process keep its end of the connection open: its end is watched too.
        if not wait([self._connection, self._process.sentinel], patience):
            raise LoaderFailed(f"no batch within {patience:.0f} s")
        try:
            if not self._connection.poll():
                raise EOFError
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, str):
            raise LoaderFailed(answer)
        return answer

    def _ended(self) -> LoaderFailed:
        self._process.join()
        return LoaderFailed(_ending(self._process.exitcode))

    def _signal(self, number: signal.Signals) -> None:
        # The process leads a group of its own as soon as it runs; after the last of the group there is none.
        assert self._process.pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


@contextmanager
def _left_out(
    name: str, contest: Contest, running: dict[str, LoaderProcess], say: Callable[[str], None]
) -> Iterator[None]:
    """Context in which a loader that fails is closed and named in the contest."""
    try:
        yield
    except LoaderFailed as error:
        running.pop(name).close()
        contest.turns.pop(name, None)
        contest.failed[name] = str(error)
        say(f"{name} is left out: {error}")


def _rates(contest: Contest) -> str:
    last = {name: turns[-1] for name, turns in contest.turns.items()}
    return ", ".join(f"{name} {turn.batches / turn.seconds:.2f} batches/s" for name, turn in last.items())


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _serve(connection: Connection, work: Work, check: Check) -> None:
    # The kernel continues and ends a stopped group whose parent has died (SIGHUP), so that nothing is left behind.
    os.setpgid(0, 0)
    with open(os.devnull, "w") as nowhere:
        # An abort of a library prints pages; its reason is told in one line.
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        batches = work()
        check(next(batches))
        connection.send(True)
        while (seconds := connection.recv()) is not None:
            connection.send(_draw(batches, seconds))
        batches.close()
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        connection.send(f"{type(error).__name__}: {first}")


def _draw(batches: Iterator[Any], seconds: float) -> Turn:
    cpu, started, count = cpu_seconds(), time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        next(batches)
        count += 1
    return Turn(count, spent, cpu_seconds() - cpu)
