"""Stacks of the Python threads of a rank, and the flight recorder of NCCL, written when a run hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

import torch

_MAX_BYTES = 2**20
"""Size of a file of stacks above which it is begun anew: about 50 faults."""

_FLIGHT_RECORDER_SECONDS = 5.0
"""Longest wait for the flight recorder, which may wait for the hanging device itself."""


class StackFile:
    """File `rank_N.txt` that receives the stacks of this rank; removed at the end if nothing was written.

    `kill -USR2 PID` makes a rank write its stacks, also while C code holds the interpreter lock.

    Args:
        folder: folder of the file, created if it is missing.
        rank: number of this rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank_{rank}.txt"
        folder.mkdir(parents=True, exist_ok=True)
        large = self.path.exists() and self.path.stat().st_size > _MAX_BYTES
        # Opened now: at a fault the disk may be full or the file system gone, and a signal handler cannot open files.
        self._file = self.path.open("w" if large else "a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)

    def write(self, reason: str) -> None:
        """Write the stacks of all threads of this process, and on GPUs the flight recorder of NCCL beside it."""
        with suppress(OSError):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._file.write(f"\n{now} pid {os.getpid()}: {reason}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
        if torch.cuda.is_available():
            recorder = Thread(target=self._write_flight_recorder, daemon=True)
            recorder.start()
            recorder.join(_FLIGHT_RECORDER_SECONDS)

    def _write_flight_recorder(self) -> None:
        # Not in torch's stubs, and absent from builds without NCCL.
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if dump is not None:
            with suppress(OSError, RuntimeError):
                self.path.with_suffix(".nccl.json").write_bytes(dump())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, and remove it if nothing was written."""
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()
        self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Remove the file if nothing was written, and its folder if that is empty."""
        with suppress(OSError):
            if not self.path.stat().st_size:
                self.path.unlink()
            self.path.parent.rmdir()
