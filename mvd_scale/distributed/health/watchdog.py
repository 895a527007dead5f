"""Watchdog of a run: ends a job that hangs, names the rank at fault, and turns errors of collectives into one message.

Every rank has two threads. One exchanges heartbeats over a connection of its own to the store of the process group:
each rank publishes its position and reads the verdict and the heartbeat of rank 0; rank 0 reads all. The other decides
without any communication, so that a cut link cannot hold it up: rank 0 over all ranks, the others over rank 0.

    rank hangs in a phase         rank 0 sees no progress, and names the rank that has entered the fewest phases,
                                  or of those in one phase has begun the fewest collectives, or written the fewest
                                  parts of checkpoints
    writing of a checkpoint hangs rank 0 sees no piece written by any rank, and names those that have not written their
                                  part, while the phases go on
    process stopped, link cut     rank 0 sees no heartbeat of the rank; the rank sees none of rank 0; a process that is
                                  stopped cannot end itself, and its guard ends it (`stall_guard`)
    process killed                a collective fails within seconds on other ranks, which ask rank 0 for its verdict
    exception on one rank         that rank reports it before it ends; the others end with its exit code
    launcher killed               the rank stops as after SIGTERM, with a checkpoint

Costs per rank and heartbeat: two requests to the store. Main threads only write their position to memory.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import psutil
import torch
from torch.distributed.distributed_c10d import Store

from mvd_scale.distributed.exchange import StoreExchange
from mvd_scale.distributed.health.launcher_processes import LauncherProcesses
from mvd_scale.distributed.health.progress import WRITING_PATIENCE
from mvd_scale.distributed.health.stack_file import StackFile
from mvd_scale.distributed.health.stall_guard import StallGuard
from mvd_scale.distributed.health.verdict import (
    Heartbeats,
    Member,
    Verdict,
    gone_verdict,
    hang_verdict,
    main_verdict,
    silent_verdict,
    writing_verdict,
)
from mvd_scale.distributed.process_group import Ranks, count_collectives
from mvd_scale.errors import FAULT_CODE, Preempted, SharedError, UserError, is_device_fault
from mvd_scale.utils.events import EventLog

logger = logging.getLogger("mvd_scale")

_PREFIX = "mvd_scale/watchdog/"
_VERDICT, _ALARM, _FAILED = (_PREFIX + name for name in ("verdict", "alarm", "failed"))
_NONE = "none"

_SECONDS_TO_END = 10.0
"""Time of the main thread of a rank to end by itself after a verdict about another rank."""

_SECONDS_TO_WRITE = 5.0
"""Longest wait for each of the event, the stacks and the removal of an empty file of stacks."""


class Watchdog:
    """Context manager that watches a run from the start of its process group to its end. All ranks create one.

    Args:
        ranks: this process among all.
        faults: folder for the stacks of ranks that hang.
        events: event log of the run.
        minutes: minutes without progress of any rank, or without a heartbeat of one, after which the run ends; None
            never ends a run that hangs, but still names ranks that are gone.
        store: store of the process group; None for that of torch's default group.
        claimed: whether the run folder is known to be this run's; otherwise faults are printed alone until `claim`.
    """

    def __init__(
        self,
        ranks: Ranks,
        faults: Path,
        events: EventLog,
        minutes: float | None,
        store: Store | None = None,
        *,
        claimed: bool = True,
    ) -> None:
        self.ranks = ranks
        self.limit = float("inf") if minutes is None else 60 * minutes
        self.interval = min(max(self.limit / 60, 0.2), 2.0)
        self._faults = faults
        self._given = store
        self._events = events
        self._beats = Heartbeats()
        self._members: dict[int, Member] = {}
        self._answered = time.monotonic()
        self._lost: str | None = None
        self._alarmed: float | None = None
        self._verdict: Verdict | None = None
        self._explained = self._ending = self._reported = False
        self._slept = False
        self._awake = 0.0
        self._claimed = claimed
        self._stacks: StackFile | None = None
        self._guard: StallGuard | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._reporting = threading.Lock()

    def __enter__(self) -> Self:
        ranks = self.ranks
        self._resources = ExitStack()
        if self._claimed:
            self.claim()
        self._writer = _FaultWriter()
        self._resources.callback(self._writer.close)
        self._launcher = LauncherProcesses()
        self._launcher_ended = False
        me = Member.own(ranks.rank)
        self._members[me.rank] = me
        self._threads = [threading.Thread(target=self._judge_until_end, name="watchdog", daemon=True)]
        if ranks.world_size > 1:
            self.connect(me)
            self._threads.append(threading.Thread(target=self._exchange_until_end, name="heartbeat", daemon=True))
            if self.limit < float("inf"):
                # Later than the other ranks notice, so that they tell the reason.
                self._guard = self._resources.enter_context(StallGuard(self.limit + 5 * self.interval))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # All ranks raise the `UserError` of rank 0 about input for which it cannot claim the folder.
            if isinstance(error, Exception) and (self._claimed or not isinstance(error, UserError)):
                # Outside of the steps, the `UserError` of rank 0 is about the input of all ranks.
                self._explain(error, named=not isinstance(error, UserError))
        finally:
            self._stop.set()
            # It may be about to write to the guard; it waits for no other rank.
            self._threads[0].join(_SECONDS_TO_END)
            self._resources.close()

    def claim(self) -> None:
        """Write stacks and events to the run folder from now on. Every rank calls it, when the folder is the run's."""
        self._stacks = self._resources.enter_context(StackFile(self._faults, self.ranks.rank))
        self._claimed = True

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Find out which rank caused an exception of a `with` block.

        If another rank did, this process ends with its exit code, and one rank prints a message about it. Nothing is
        cleaned up then: threads and libraries may wait for the rank that is gone.

        Raises:
            UserError: in place of a `UserError` or `OSError` of rank 0, with its name and phase.
        """
        try:
            yield
        except Exception as error:
            self._explain(error, named=True)
            raise

    def connect(self, me: Member) -> None:
        """Publish this process, and read those whose end this rank may have to tell: all of its host, and rank 0."""
        # A connection of its own: a request of the main thread may wait for hours.
        ranks, store = self.ranks, (self._given or self.ranks.store).clone()
        self._store = store
        store.set(f"{_PREFIX}who {me.rank}", me.to_json())
        self._publish()
        if ranks.is_main:
            for key in (_VERDICT, _ALARM, _FAILED):
                store.set(key, _NONE)
        exchange = StoreExchange(store, ranks.rank, ranks.world_size, ranks.timeout, place=ranks.host)
        known = range(ranks.world_size) if ranks.is_main else (0,)
        others = self._read([f"{_PREFIX}who {rank}" for rank in known])
        for member in map(Member.parse, [*exchange.gather("processes", me.to_json()).values(), *others]):
            self._members[member.rank] = member

    def _read(self, keys: list[str]) -> list[str]:
        return [value.decode() for value in self._store.multi_get(keys)]

    def _publish(self) -> None:
        position = self.ranks.progress.position._replace(collectives=count_collectives())
        self._store.set(f"{_PREFIX}beat {self.ranks.rank}", f"{time.monotonic()} {position}")

    def _exchange_until_end(self) -> None:
        """Exchange heartbeats until the end of the run, or until the store is lost."""
        try:
            while not self._stop.wait(self.interval):
                self.exchange()
        except RuntimeError as error:
            # torch's errors of the store are RuntimeErrors; the other thread decides what it means.
            self._lost = str(error).splitlines()[0]

    def exchange(self) -> None:
        """Publish the heartbeat of this rank and read that of rank 0; rank 0 reads all."""
        self._publish()
        watched = range(self.ranks.world_size) if self.ranks.is_main else (0,)
        verdict, alarm, failed, *beats = self._read(
            [_VERDICT, _ALARM, _FAILED, *(f"{_PREFIX}beat {r}" for r in watched)]
        )
        now = time.monotonic()
        with self._lock:
            self._answered = now
            for rank, beat in zip(watched, beats, strict=True):
                self._beats.record(rank, beat, now)
            self._take(verdict, alarm, failed, now)

    def _take(self, verdict: str, alarm: str, failed: str, now: float) -> None:
        """Take what ranks have reported: rank 0 makes it a verdict, the others follow that."""
        if verdict != _NONE:
            self._verdict = self._verdict or Verdict.parse(verdict)
        elif self.ranks.is_main and failed != _NONE:
            self._decide(Verdict.parse(failed))
        elif alarm != _NONE and self._alarmed is None:
            self._alarmed = now
            if self.ranks.is_main and (gone := [int(rank) for rank in alarm.split()]):
                self._decide(gone_verdict(gone, self._beats, self._members))

    def _decide(self, verdict: Verdict) -> None:
        """Give the verdict of rank 0 to all ranks. Called with the lock or by one thread only."""
        if self._verdict is None:
            self._verdict = verdict
            if self.ranks.is_main and self.ranks.world_size > 1:
                with suppress(RuntimeError):
                    self._store.set(_VERDICT, verdict.to_json())

    def _judge_until_end(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.interval):
            if self._guard is not None:
                self._guard.beat()
            now = time.monotonic()
            with self._lock:
                if now - before > max(5 * self.interval, 1.0):
                    self._wake_up(now, now - before)
                if self._verdict is None:
                    self._judge(now)
            before = now
            if self._verdict is not None:
                return self._end(self._verdict)
            self._check_launcher()

    def _wake_up(self, now: float, slept: float) -> None:
        """Begin anew to wait for the others after this process was stopped: what they sent meanwhile was not read."""
        self._slept = self._slept or slept > 0.8 * self.limit
        # The others may have ended meanwhile, which this process notices after one limit.
        self._awake = now + self.limit + 5 * self.interval
        self._answered = now
        self._beats.restart(now)

    def _judge(self, now: float) -> None:
        """Decide whether the run goes on."""
        self._slept = self._slept and now < self._awake
        if self.ranks.world_size == 1:
            self._beats.record(0, f"{now} {self.ranks.progress.position}", now)
        if self.ranks.is_main:
            if not self._beats.positions:
                return
            # After an alarm a rank that lives has three intervals to show it.
            limit = self.limit if self._alarmed is None else 3 * self.interval
            if silent := self._beats.silent(now, limit):
                self._decide(silent_verdict(silent, limit, self._beats, self._members))
            elif self._alarmed is None and self._beats.hang(now, self.limit):
                self._decide(hang_verdict(self.limit, self._faults, self._beats, self._members))
            elif self._alarmed is None and (late := self._beats.late_writers(now, self.limit)):
                seconds = self.limit * WRITING_PATIENCE
                self._decide(writing_verdict(late, seconds, self._faults, self._beats, self._members))
        elif self._lost is not None:
            self._decide(main_verdict("has ended", self._beats, self._members, hangs=False))
        else:
            since = min(self._answered, self._beats.seen.get(0, self._answered))
            limit = self.limit if self._alarmed is None else 4 * self.interval
            if now - since > limit:
                how = f"has not answered for {limit:.0f} s"
                self._decide(main_verdict(how, self._beats, self._members, hangs=True))

    def _end(self, verdict: Verdict) -> None:
        """End this process, which hangs, or has another 10 s to end by itself."""
        self._ending = verdict.hangs
        if not verdict.hangs and self._stop.wait(_SECONDS_TO_END):
            return
        # First of all: what follows writes to the run folder, and the main thread may be about to report it.
        self._report(verdict)
        if verdict.hangs:
            if (stacks := self._stacks) is not None:
                self._writer.begin(lambda: stacks.write(verdict.message)).wait(_SECONDS_TO_WRITE)
            self._wake_neighbours(verdict)
        self._linger()
        self._leave(verdict.code)

    def _wake_neighbours(self, verdict: Verdict) -> None:
        """Make ranks of this host that hang and do not end by themselves write their stacks.

        They are stopped, or C code holds their interpreter. A rank whose watchdog runs is left to it: the handler of
        the signal reads the stacks of all threads as they run, and could crash the process before it ends.
        """
        hanging = [member for member in self._neighbours() if member.rank in verdict.ranks]
        deadline = time.monotonic() + 4 * self.interval
        while time.monotonic() < deadline and any(member.lives for member in hanging):
            time.sleep(self.interval / 4)
        for member in hanging:
            if member.lives:
                with suppress(OSError):
                    os.kill(member.pid, signal.SIGUSR2)
                    os.kill(member.pid, signal.SIGCONT)

    def _neighbours(self) -> list[Member]:
        """Other ranks whose processes this one can see by their numbers."""
        me = self._members[self.ranks.rank]
        return [member for member in self._members.values() if member.space == me.space and member.rank != me.rank]

    def _report(self, verdict: Verdict) -> None:
        """Print the verdict and record it, on the one rank that reports."""
        if self._reports(verdict) and not verdict.told:
            self._tell(verdict)

    def _tell(self, verdict: Verdict, *, printed: bool = True) -> None:
        """Print and record a verdict, unless this process has told one before. Both threads may call it.

        Args:
            verdict: what to tell.
            printed: whether to print it; otherwise the command line does.
        """
        with self._reporting:
            if self._reported:
                return
            self._reported = True
            if printed:
                _print(verdict)
            if not self._claimed:
                return
            recorded = self._writer.begin(lambda: self._record(verdict))
        recorded.wait(_SECONDS_TO_WRITE)

    def _reports(self, verdict: Verdict) -> bool:
        """Whether this rank reports a verdict: rank 0, or where that is at fault, the first other rank of each host."""
        if self._slept:
            # This process did not answer the others, not they.
            return False
        if 0 not in verdict.ranks or self.ranks.world_size == 1:
            return self.ranks.is_main
        # Ranks other than 0 know those of their own host, and rank 0.
        return self.ranks.rank == min(rank for rank in self._members if rank)

    def _record(self, verdict: Verdict) -> None:
        hosts = sorted({self._members[rank].host for rank in verdict.ranks if rank in self._members})
        position = self.ranks.progress.position
        self._events.write("fault", message=verdict.message, ranks=list(verdict.ranks), hosts=hosts, step=position.step)

    def _check_launcher(self) -> None:
        """Stop as after SIGTERM, once, if a process that launched this rank has ended."""
        if not self._launcher_ended and (pid := self._launcher.ended()) is not None:
            self._launcher_ended = True
            me, where = self._members[self.ranks.rank], self.ranks.progress.position.description
            # Most often it has launched all ranks of this host, of which one speaks.
            if all(me.rank < neighbour.rank for neighbour in self._neighbours()):
                logger.warning(
                    "the launcher of %s, process %d, has ended in %s: the run stops after a checkpoint",
                    me.name,
                    pid,
                    where,
                )
            os.kill(os.getpid(), signal.SIGTERM)

    def _explain(self, error: Exception, *, named: bool) -> None:
        """Report an exception of this rank to the others; end the process if another rank caused it.

        Args:
            error: the exception.
            named: whether the message that the command line prints for it is to name rank 0 and its phase.

        Raises:
            UserError: with that message.
        """
        if self._explained or isinstance(error, Preempted) or self.ranks.world_size == 1:
            return
        # A launcher that has seen a rank die ends the others by SIGTERM, before they can say why.
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._ending:
            # The other thread ends this process.
            time.sleep(_SECONDS_TO_END + 3 * _SECONDS_TO_WRITE + 6 * self.interval)
        self._explained = True
        if not _is_communication(error):
            return self._report_failure(error, named=named)
        verdict = self._ask()
        if verdict is None:
            # All ranks live: it is this rank's own, whatever its text reads like.
            return self._report_failure(error, named=named)
        self._report(verdict)
        self._linger()
        self._leave(verdict.code)

    def _report_failure(self, error: Exception, *, named: bool) -> None:
        """Report an exception of this rank to the others; one rank prints and records it with its name and phase.

        The command line prints the `UserError` of rank 0, and Python the tracebacks of all. An error that all ranks
        raise is reported by rank 0.

        Raises:
            UserError: see `_explain`.
        """
        main, for_user = self.ranks.is_main, isinstance(error, (UserError, OSError))
        if not main:
            time.sleep(2 * self.interval)
        verdict = self._verdict_on(error)
        first = verdict
        with suppress(RuntimeError):
            first = Verdict.parse(self._store.compare_set(_FAILED, _NONE, verdict.to_json()).decode())
        told_by_main = isinstance(error, SharedError) or getattr(error, "reported", False)
        if first == verdict and (main or not told_by_main):
            self._tell(verdict, printed=not (main and for_user))
        if for_user and not main:
            self._leave(first.code)
        self._linger()
        if named and for_user and not isinstance(error, SharedError):
            raise UserError(verdict.message) from error

    def _verdict_on(self, error: Exception) -> Verdict:
        """Verdict on an exception of this rank, or on that of others which all ranks raise."""
        rank, name = self.ranks.rank, self._members[self.ranks.rank].name
        where = self.ranks.progress.position.description
        if isinstance(error, SharedError):
            return Verdict(str(error), error.exit_code, error.ranks, told=True)
        if isinstance(error, (UserError, OSError)):
            # As the command line takes them, see `cli.main`.
            code = getattr(error, "exit_code", UserError.exit_code)
            return Verdict(f"{name} failed in {where}: {error}", code, (rank,), told=True)
        code = FAULT_CODE if is_device_fault(error) else 1
        return Verdict(f"{name} failed in {where}: {type(error).__name__}: {error}", code, (rank,), told=True)

    def _ask(self) -> Verdict | None:
        """Raise the alarm and wait for the verdict; None if all ranks live."""
        gone = [str(member.rank) for member in self._neighbours() if not member.lives]
        with suppress(RuntimeError):
            self._store.compare_set(_ALARM, _NONE, " ".join(gone))
        deadline = time.monotonic() + 8 * self.interval + 1
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(self.interval / 4)
        return self._verdict

    def _leave(self, code: int) -> None:
        """End this process at once."""
        if self._stacks is not None:
            self._writer.begin(self._stacks.remove_if_empty).wait(_SECONDS_TO_WRITE)
        _exit_with_children(code)

    def _linger(self) -> None:
        """Let the others read from the store, which lives in the process of rank 0."""
        if self.ranks.is_main and self.ranks.world_size > 1:
            time.sleep(2 * self.interval)


def _print(verdict: Verdict) -> None:
    print(f"mvd-scale: {verdict.message}", file=sys.stderr, flush=True)


class _FaultWriter:
    """Thread that writes to the run folder at a fault: its file system may be what hangs.

    It starts with the run: where stacks are dumped by a signal, a thread that begins or ends could crash the process.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], None], threading.Event] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="fault", daemon=True).start()

    def begin(self, work: Callable[[], None]) -> threading.Event:
        """Call a function after those before it; return the event of its end. Errors of files are left out."""
        ended = threading.Event()
        self._work.put((work, ended))
        return ended

    def close(self) -> None:
        """End the thread after what was begun, without waiting for it."""
        self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, ended = item
            # A ValueError is that of a file that the end of the run has closed meanwhile.
            with suppress(OSError, ValueError):
                work()
            ended.set()


def _is_communication(error: Exception) -> bool:
    """Whether an exception comes from a collective or the store, as far as its text tells."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "NCCL", "onnection", "Broken pipe", "Socket", "imed out", "rank")
    )


def _exit_with_children(code: int) -> None:
    """End this process at once, and its worker processes, which nobody else would end."""
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)
