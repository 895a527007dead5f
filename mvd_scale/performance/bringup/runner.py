"""Runner of stages: a process for each, which is ended when it hangs and started anew when it crashes.

Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvd_scale import __version__
from mvd_scale.performance.bringup.results import BringUp, CheckResult, StageResult
from mvd_scale.performance.bringup.session import Arguments
from mvd_scale.performance.bringup.stages import Stage, budgets

_POLL = 0.05
"""Seconds between two looks at a stage."""

_ATTEMPTS = 6
"""Largest number of processes of one stage."""

_LEAST = 15.0
"""Least seconds of a stage's budget with which it is started again after a crash."""

_LOG_LINES = 30
"""Lines of the log that the result of a crashed check holds."""


@dataclass(frozen=True)
class Settings:
    """Settings of a bring-up."""

    out: Path
    """Folder for `bringup.md`, `bringup.json` and `bringup.log`."""

    device: str
    minutes: float | None
    """Time of all stages together; None for the sum of their own budgets."""

    paths: tuple[str, ...] = ()
    """Folders that stages import from, before those of this process."""


class Runner:
    """Bring-up in progress.

    Args:
        stages: stages to run, in this order.
        settings: settings of the bring-up.
    """

    def __init__(self, stages: Sequence[Stage], settings: Settings) -> None:
        self.stages, self.settings = stages, settings
        started = datetime.datetime.now().isoformat(" ", "seconds")
        results = [StageResult(stage.letter, stage.title) for stage in stages]
        self.results = BringUp(__version__, started, settings.device, results)
        self._began = time.monotonic()

    def run(self) -> BringUp:
        """Run all stages; the files in `Settings.out` are complete at any moment."""
        self.settings.out.mkdir(parents=True, exist_ok=True)
        (self.settings.out / "bringup.log").write_text("", encoding="utf-8")
        self._write()
        deadline = self._began
        seconds = budgets(self.stages, self.settings.minutes)
        for stage, result, budget in zip(self.stages, self.results.stages, seconds, strict=True):
            # What earlier stages left over is available to later ones.
            deadline += budget
            self._run_stage(stage, result, deadline)
        self.results.ended = True
        self._write()
        return self.results

    def _write(self) -> None:
        self.results.seconds = time.monotonic() - self._began
        self.results.write(self.settings.out)

    def _run_stage(self, stage: Stage, result: StageResult, deadline: float) -> None:
        result.outcome, started = "running", time.monotonic()
        self._write()
        with tempfile.TemporaryDirectory(prefix="mvd_bringup_") as folder:
            for _ in range(_ATTEMPTS):
                process = StageProcess(stage, result, deadline, Path(folder), self.settings)
                for _ in process.events():
                    result.seconds = time.monotonic() - started
                    self._write()
                if process.ended or deadline - time.monotonic() < _LEAST:
                    break
        result.seconds = time.monotonic() - started
        if result.outcome == "running":
            result.outcome = "done" if process.ended else "cut off"
            result.reason = process.reason
        self._write()
        print(
            f"({stage.letter}) {stage.title}: {result.outcome}, {result.counts()}, {result.seconds:.0f} s", flush=True
        )


class StageProcess:
    """One process of a stage.

    Args:
        stage: the stage.
        result: results of the stage so far, to which those of this process are added.
        deadline: time of `time.monotonic` at which the process is ended.
        folder: temporary folder.
        settings: settings of the bring-up.
    """

    ended = False
    """Whether the stage came to its end."""

    reason = ""
    """Reason why it did not."""

    def __init__(self, stage: Stage, result: StageResult, deadline: float, folder: Path, settings: Settings) -> None:
        self._result, self._deadline, self._log = result, deadline, settings.out / "bringup.log"
        self._file = Path(tempfile.mkstemp(suffix=".jsonl", dir=folder)[1])
        self._limit, self._begun = deadline, time.monotonic()
        arguments = Arguments(
            module=stage.module,
            needs=stage.needs,
            needs_gpu=stage.needs_gpu,
            device=settings.device,
            events=str(self._file),
            deadline=deadline,
            done=tuple(check.name for check in result.checks),
            folder=str(folder),
        )
        self._alive, alive = os.pipe()
        self._parent_end = alive
        # The guard ends the stage with all of its processes when this process is killed.
        command = [sys.executable, "-m", "mvd_scale.distributed.process_guard", str(self._alive), sys.executable, "-m"]
        worker = "mvd_scale.performance.bringup.worker"
        with self._log.open("ab") as log:
            log.write(f"== ({stage.letter}) {stage.title}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [*command, worker, json.dumps(dataclasses.asdict(arguments))],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=(self._alive,),
                start_new_session=True, env=_environment(settings),
            )  # fmt: skip

    def events(self) -> Iterator[None]:
        """Take up what the process tells until it ends or is ended; yields after each change of the results."""
        try:
            with self._file.open(encoding="utf-8") as lines:
                while True:
                    ended = self._process.poll() is not None
                    yield from self._read(lines)
                    if ended:
                        break
                    if time.monotonic() > self._limit:
                        yield from self._stop(lines)
                        return
                    time.sleep(_POLL)
        finally:
            self._end()
        if not self.ended:
            yield from self._crashed()

    def _read(self, lines: Any) -> Iterator[None]:
        # A line may be partial: the rest of it comes with the next look.
        while line := _whole_line(lines):
            self._take(json.loads(line))
            yield

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "begin":
            self._begun = time.monotonic()
            self._limit = min(self._begun + event["limit"], self._deadline)
            self._result.checks.append(CheckResult(event["name"], "running"))
        elif kind == "end":
            self._limit = self._deadline
            if self._running is not None:
                self._result.checks.pop()
            self._result.checks.append(CheckResult(**event))
        elif kind == "left out":
            self._result.outcome, self._result.reason = "left out", event["reason"]
        elif kind == "broken":
            self.reason = "an error of the GPU's context that stays"
        elif kind == "done":
            self.ended = True

    @property
    def _running(self) -> CheckResult | None:
        last = self._result.checks[-1] if self._result.checks else None
        return last if last is not None and last.outcome == "running" else None

    def _stop(self, lines: Any) -> Iterator[None]:
        """End a process whose check hangs, or whose stage has no time left."""
        spent = time.monotonic() > self._deadline
        self._end()
        yield from self._read(lines)
        if self.ended:
            return
        self.reason = "the time of the stage is spent" if spent else "a check hung"
        if (check := self._running) is not None:
            check.outcome, check.seconds = "cut off" if spent else "hung", time.monotonic() - self._begun
            check.reason, check.details = self.reason, self._log_end()
        yield

    def _crashed(self) -> Iterator[None]:
        """Take up the end of a process that did not say that it was done."""
        died = f"the process ended {_manner(self._process.returncode)}"
        self.reason = self.reason or died
        if (check := self._running) is not None:
            check.outcome, check.seconds = "crashed", time.monotonic() - self._begun
            check.reason, check.details = died, self._log_end()
            yield
        elif self.reason == died:
            # Between two checks: without this row the stage would be started again and again without a trace.
            self._result.checks.append(CheckResult("the stage itself", "crashed", 0.0, died, {}, self._log_end()))
            yield

    def _log_end(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])

    def _end(self) -> None:
        """End all processes of the stage."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for descriptor in (self._alive, self._parent_end):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _manner(code: int) -> str:
    """Describe the end of a process by its exit code, which the guard passes on as a number from 0 to 255."""
    number = 256 - code
    return f"by signal {signal.Signals(number).name}" if number in set(signal.Signals) else f"with code {code}"


def _whole_line(lines: Any) -> str:
    """Read a line that is complete; an empty string, and no progress in the file, if there is none."""
    place = lines.tell()
    line: str = lines.readline()
    if not line.endswith("\n"):
        lines.seek(place)
        return ""
    return line


def _environment(settings: Settings) -> dict[str, str]:
    paths = [*settings.paths, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
