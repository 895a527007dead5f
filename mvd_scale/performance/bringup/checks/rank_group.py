"""Ranks of this machine that do the jobs of `zero_ranks`, and their results as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mvd_scale.distributed.free_port import free_port

PROGRAM = [sys.executable, "-m", "mvd_scale.performance.bringup.checks.zero_ranks"]
"""Command of a rank, before its arguments."""

_POLL = 0.1
"""Seconds between two looks at the results."""


class RankFailed(Exception):
    """A rank ended before it had done its jobs."""


class RankGroup:
    """Processes of one job, one for each rank. They belong to this process's group, so that they end with it.

    Args:
        device: `cuda` or `cpu`.
        ranks: number of ranks.
        folder: folder for the results, which must not contain any.
        jobs: names of the jobs, in their order.
    """

    def __init__(self, device: str, ranks: int, folder: Path, jobs: Sequence[str]) -> None:
        self.jobs = jobs
        self._files = [folder / f"rank{rank}.jsonl" for rank in range(ranks)]
        command = [*PROGRAM, device, str(folder), *jobs]
        shared = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port(host="127.0.0.1")),
        }
        self._processes = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all ranks."""
        for process in self._processes:
            process.kill()
            process.wait()

    @property
    def broken(self) -> bool:
        """Whether a rank has ended without success."""
        return any(process.poll() not in (None, 0) for process in self._processes)

    def wait_for(self, job: str) -> list[Any]:
        """Wait for a job, and return the results of all ranks.

        Raises:
            RankFailed: a rank ended before it had done the job.
        """
        while True:
            # Before the look at the results: a rank may end after its last job.
            codes = [process.poll() for process in self._processes]
            found = [_results(file) for file in self._files]
            if all(job in results for results in found):
                return [results[job] for results in found]
            ended = {rank: code for rank, code in enumerate(codes) if code is not None and job not in found[rank]}
            if ended:
                said = ", ".join(f"rank {rank} ended with code {code}" for rank, code in ended.items())
                raise RankFailed(f"{said} before it had done {job!r}; the log has its message")
            time.sleep(_POLL)


def _results(file: Path) -> dict[str, Any]:
    """Read the results that a rank has written so far, by job."""
    if not file.exists():
        return {}
    # The last line may be partial.
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return {entry["job"]: entry["result"] for entry in map(json.loads, lines)}
