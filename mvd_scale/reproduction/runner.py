"""Runner of a table in miniature: stages that are missing, several side by side; a stage that fails is named."""

from __future__ import annotations

import logging
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mvd_scale.config.pipeline import Pipeline, TrainStage, references
from mvd_scale.errors import UserError
from mvd_scale.pipelines.runner import (
    exclusive_lock,
    run_local_stage,
    runs_on_ranks,
    stage_arguments,
    stage_output,
    write_recipe,
)
from mvd_scale.pipelines.stage_job import StageJob
from mvd_scale.reproduction.records import StageConfigs, code_version, is_finished

logger = logging.getLogger("mvd_scale")

_POLL_SECONDS = 0.05


Failures = Mapping[str, str]
"""Reason for each stage that failed or was left out, by its name."""


def run_missing(
    pipeline: Pipeline, jobs: int, on_change: Callable[[Failures], None] = lambda failed: None
) -> dict[str, str]:
    """Run the stages of a pipeline that are not finished, each that runs on ranks as one rank on CPUs of its own.

    A stage that fails does not stop the others, but those that are made from it.

    Args:
        pipeline: pipeline of a table.
        jobs: number of stages side by side; the CPUs are divided among them.
        on_change: called at the start and whenever a stage has finished or failed.

    Returns:
        the reason for each stage that failed or was left out, by its name.

    Raises:
        UserError: a recipe is invalid, a finished stage has another configuration now, there are fewer CPUs than jobs,
            or another process works in the folder. Nothing was run.
    """
    configs = StageConfigs(pipeline)
    configs.check_unchanged()
    slots = _divide_cpus(jobs)
    with exclusive_lock(pipeline.folder) as lock:
        return _Schedule(pipeline, configs, slots, lock, on_change).run()


def _divide_cpus(jobs: int) -> list[list[int]]:
    cpus = sorted(os.sched_getaffinity(0))
    if jobs > len(cpus):
        raise UserError(f"--jobs {jobs} is more than the {len(cpus)} CPUs of this process: give at most {len(cpus)}")
    return [cpus[slot::jobs] for slot in range(jobs)]


class _Schedule:
    """Stages that wait, run and have ended."""

    def __init__(
        self,
        pipeline: Pipeline,
        configs: StageConfigs,
        slots: list[list[int]],
        lock: int,
        on_change: Callable[[Failures], None],
    ) -> None:
        self._pipeline, self._configs, self._lock, self._on_change = pipeline, configs, lock, on_change
        self._free = slots
        self._waiting = [name for name in pipeline.stages if not is_finished(pipeline, name)]
        self._done = {name for name in pipeline.stages if name not in self._waiting}
        self._running: dict[str, tuple[StageJob, list[int], float]] = {}
        self._failed: dict[str, str] = {}
        self._commits: dict[str, str] = {}
        self._number = len(self._waiting)

    def run(self) -> dict[str, str]:
        logger.info("%d of %d stages are missing", self._number, len(self._pipeline.stages))
        self._on_change(self._failed)
        usual = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            while self._waiting or self._running:
                self._leave_out()
                if not self._start_one() and not self._collect():
                    time.sleep(_POLL_SECONDS)
        finally:
            for job, _, _ in self._running.values():
                job.end()
            signal.signal(signal.SIGTERM, usual)
        return self._failed

    def _leave_out(self) -> None:
        """Drop stages that are made from one that failed."""
        for name in list(self._waiting):
            failed = [other for other in references(self._pipeline.stages[name]) if other in self._failed]
            if failed:
                self._waiting.remove(name)
                self._failed[name] = f"left out, because {failed[0]} failed"

    def _start_one(self) -> bool:
        """Start the first stage whose sources are done; returns whether there was one and it could."""
        ready = (name for name in self._waiting if self._done.issuperset(references(self._pipeline.stages[name])))
        name = next(ready, None)
        if name is None or not self._free:
            return False
        self._waiting.remove(name)
        stage = self._pipeline.stages[name]
        position = self._number - len(self._waiting)
        logger.info("stage %d/%d, %s: %s", position, self._number, name, stage.title or stage.kind)
        self._commits[name] = code_version()
        if not runs_on_ranks(stage):
            self._run_here(name)
            return True
        if isinstance(stage, TrainStage):
            write_recipe(self._pipeline, name)
        cpus = self._free.pop()
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(len(cpus))}
        with self._log(name).open("ab") as output:
            job = StageJob(_command(self._pipeline, name), env=env, lock=self._lock, cpus=cpus, output=output)
        self._running[name] = job, cpus, time.monotonic()
        return True

    def _log(self, name: str) -> Path:
        """File for what a stage prints; it stays if the stage fails."""
        return self._pipeline.folder / f"{name}.log"

    def _run_here(self, name: str) -> None:
        before = _cpu_seconds()
        try:
            run_local_stage(self._pipeline, name)
        except (UserError, OSError) as error:
            self._fail(name, str(error))
            return
        self._finish(name, _cpu_seconds() - before)

    def _collect(self) -> bool:
        """Take note of the stages that have ended; returns whether there were any."""
        ended = [name for name, (job, _, _) in self._running.items() if job.poll() is not None]
        for name in ended:
            job, cpus, started = self._running.pop(name)
            job.end()
            self._free.append(cpus)
            code = job.wait()
            if code or not stage_output(self._pipeline, name).exists():
                command = shlex.join(stage_arguments(self._pipeline, name))
                told = f"`mvd-scale {command}` ended with exit code {code}; {self._log(name)} has its messages"
                self._fail(name, told)
                continue
            logger.info("%s: done in %.1f minutes", name, (time.monotonic() - started) / 60)
            self._finish(name, job.cpu_seconds)
        return bool(ended)

    def _fail(self, name: str, reason: str) -> None:
        logger.error("stage %s failed: %s", name, reason)
        self._failed[name] = reason
        self._on_change(self._failed)

    def _finish(self, name: str, cpu_seconds: float) -> None:
        self._configs.record(name, cpu_seconds / 60, self._commits[name])
        self._done.add(name)
        self._log(name).unlink(missing_ok=True)
        self._on_change(self._failed)


def _command(pipeline: Pipeline, name: str) -> list[str]:
    """Command of a stage, without a launcher, which would take longer to start than the shortest stages take to run."""
    return [sys.executable, "-m", "mvd_scale", *stage_arguments(pipeline, name)]


def _cpu_seconds() -> float:
    """Time on CPUs of this process and of all its processes that have ended, such as those that probe videos."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)
