"""Writing of checkpoints by a thread beside the training: on all ranks together, complete or absent."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

from mvd_scale.checkpoints.tensor_folder import STATE, complete_description, save_pieces
from mvd_scale.distributed.exchange import StoreExchange
from mvd_scale.distributed.health.verdict import Member
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import SharedError, UserError
from mvd_scale.training.checkpointing.files import Record, describe_files, flush_folder, write_record
from mvd_scale.training.checkpointing.folders import checkpoint_folder, partial_folder, saved_steps
from mvd_scale.training.checkpointing.pieces import PiecesSavePlanner, State
from mvd_scale.training.checkpointing.selection import Retention
from mvd_scale.utils.io import write_atomic

logger = logging.getLogger("mvd_scale")

_SPARE_BYTES = 64 * 2**20
"""Free disk space that is required beside the tensors of a checkpoint: for its JSON files, logs and metrics."""

_TIMEOUT = timedelta(hours=2)
"""Longest wait of a rank for the files of the others."""


class CheckpointWriter:
    """Writer of the checkpoints of one model. All ranks create one and call its methods.

    Args:
        path: folder of the checkpoints.
        ranks: this process among all.
        retention: checkpoints to keep.
        check: function that rank 0 calls before a checkpoint gets its name; its `UserError` leaves it partial.
    """

    def __init__(
        self, path: Path, ranks: Ranks, retention: Retention, check: Callable[[], None] = lambda: None
    ) -> None:
        self._check = check
        self.path = path
        self.ranks = ranks
        self._retention = retention
        # A connection of its own, on which the thread waits while the training uses the other. A group of gloo would
        # have as many connections on each rank as there are ranks.
        self._exchange = StoreExchange(ranks.store.clone(), ranks.rank, ranks.world_size, _TIMEOUT)
        self._writing: _Writing | None = None

    def make_room(self, step: int, needed: int) -> None:
        """Create the folder of a checkpoint and check that its disk has room. Only rank 0 calls it.

        Raises:
            UserError: the disk has less than `needed` bytes free; there is no folder then.
        """
        partial = partial_folder(self.path, step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < needed + _SPARE_BYTES:
            partial.rmdir()
            raise UserError(
                f"no room for checkpoint {checkpoint_folder(self.path, step)}: it takes {needed / 2**30:.2f} GiB, and "
                f"{free / 2**30:.2f} GiB are free. Free some space, or lower checkpoints.keep, and start the same "
                "command again; it resumes from the last checkpoint"
            )

    def start(
        self, step: int, state: State, document: dict[str, Any], saved: Callable[[float], None] = lambda _: None
    ) -> None:
        """Begin to write a checkpoint, and return at once.

        Args:
            step: number of optimizer steps, which names the checkpoint.
            state: tensors on the CPU that nobody changes.
            document: content of `state.json`.
            saved: function that rank 0 calls when the checkpoint is on disk, with the seconds that it took.
        """
        self.ranks.progress.begin_writing(self, step)
        self._writing = _Writing(step, lambda: self._write(step, state, document, saved), self._end)

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint could not be written; false while it is being written."""
        return self._writing is not None and self._writing.error is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: it could not be written; a `SharedError` if all ranks know that.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        error = writing.join()
        if error is not None:
            whole = saved_steps(self.path)
            last = f"the last whole one is {checkpoint_folder(self.path, whole[-1])}" if whole else "there is no other"
            text = f"checkpoint {checkpoint_folder(self.path, writing.step)} could not be written: {error}; {last}"
            raise (SharedError(text, error.ranks) if isinstance(error, SharedError) else UserError(text)) from error

    def finish(self, seconds: float) -> None:
        """Wait for the last checkpoint at the end of a failed run; an error of writing was logged.

        Args:
            seconds: longest wait, after which the checkpoint may remain partial.
        """
        if self._writing is not None:
            self._writing.join(seconds)

    def _end(self) -> None:
        self.ranks.progress.end_writing(self)

    def _write(self, step: int, state: State, document: dict[str, Any], saved: Callable[[float], None]) -> None:
        """Write a checkpoint and give it its name when all of it is on disk. The thread of every rank calls it.

        Raises:
            SharedError: any rank failed.
            Exception: the ranks could not agree.
        """
        started = time.monotonic()
        own = self._write_own(step, state)
        self.ranks.progress.count_part()
        if not self.ranks.is_main:
            # From here on it waits for rank 0.
            self._end()
        failure = self._exchange.decide(f"step {step}", own, lambda parts: self._complete(step, document, parts))
        if failure is not None:
            shared = SharedError(failure["message"], failure["ranks"])
            shared.reported = not self.ranks.is_main
            raise shared
        if self.ranks.is_main:
            seconds = time.monotonic() - started
            logger.info("saved checkpoint %s (%.1f s beside the training)", checkpoint_folder(self.path, step), seconds)
            saved(seconds)

    def _write_own(self, step: int, state: State) -> _Part:
        """Write the pieces of this rank; any error is returned, so that the other ranks learn of it."""
        partial = partial_folder(self.path, step)
        try:
            save_pieces(state, partial, PiecesSavePlanner(self.ranks.progress), self.ranks.rank)
            return {"files": describe_files(partial.glob(f"__{self.ranks.rank}_*")), "error": None}
        except Exception as error:
            return {"files": {}, "error": self._describe(error, step)}

    def _describe(self, error: Exception, step: int) -> str:
        return f"{Member.own(self.ranks.rank).name} failed in 'save' of step {step}: {error}"

    def _complete(self, step: int, document: dict[str, Any], parts: list[_Part]) -> _Failure | None:
        """Write the JSON files, rename the folder and delete superseded checkpoints. Only rank 0 calls it.

        Returns:
            the errors of all ranks that failed, or None.
        """
        if failed := {rank: part["error"] for rank, part in enumerate(parts) if part["error"] is not None}:
            return {"message": "; ".join(failed.values()), "ranks": list(failed)}
        partial = partial_folder(self.path, step)
        try:
            self._check()
            complete_description(partial, self.ranks.world_size)
            write_atomic(partial / STATE, json.dumps(document, indent=1))
            records = [*(part["files"] for part in parts), describe_files(partial.glob("*.json"))]
            write_record(partial, {name: file for record in records for name, file in record.items()})
            partial.rename(checkpoint_folder(self.path, step))
            flush_folder(self.path)
            self._retention.delete_old()
        except (OSError, UserError) as error:
            return {"message": self._describe(error, step), "ranks": [0]}
        return None


class _Part(TypedDict):
    """Report of a rank to rank 0 about its part of a checkpoint."""

    files: Record
    error: str | None


class _Failure(TypedDict):
    """Answer of rank 0 to all ranks about a checkpoint that could not be written."""

    message: str
    ranks: list[int]


class _Writing:
    """Thread that writes a checkpoint, and calls `ended` at last."""

    def __init__(self, step: int, write: Callable[[], None], ended: Callable[[], None]) -> None:
        self.step = step
        self._write, self._ended = write, ended
        self.error: Exception | None = None
        """Error that ended the thread."""
        # The process may end without it: after the death of another rank nobody may answer.
        self._thread = threading.Thread(target=self._run, name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def join(self, seconds: float | None = None) -> Exception | None:
        """Wait for the end of the thread, at most so long, and return the error that ended it."""
        self._thread.join(seconds)
        return self.error

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self.error = error
            if not getattr(error, "reported", False):
                logger.error("the checkpoint after step %d could not be written: %s", self.step, error)
        finally:
            self._ended()
