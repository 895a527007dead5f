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
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from mvd_scale.checkpoints.tensor_folder import STATE, TensorFolderWriter, reasons
from mvd_scale.config.training import CheckpointConfig
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.training.checkpointing.files import Record, describe_files, flush_folder, write_record
from mvd_scale.training.checkpointing.folders import PARTIAL, checkpoint_folder, saved_steps
from mvd_scale.training.checkpointing.pieces import PiecesSavePlanner, State
from mvd_scale.utils.io import write_atomic

logger = logging.getLogger("mvd_scale")

_SPARE_BYTES = 64 * 2**20
"""Free disk space that is required beside the tensors of a checkpoint: for its JSON files, logs and metrics."""

_TIMEOUT = timedelta(hours=2)
"""Longest wait of a rank for the files of the others."""


class CheckpointWriter:
    """Writer of the checkpoints of one run. All ranks create one and call its methods.

    Args:
        path: folder of the checkpoints.
        ranks: this process among all.
        config: checkpoints to keep.
        check: function that rank 0 calls before a checkpoint gets its name; its `UserError` leaves it partial.
    """

    def __init__(
        self, path: Path, ranks: Ranks, config: CheckpointConfig, check: Callable[[], None] = lambda: None
    ) -> None:
        self._check = check
        self.path = path
        self.ranks = ranks
        self.config = config
        # A group of its own: the thread communicates while the training does.
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
        self._writing: _Writing | None = None

    def make_room(self, step: int, needed: int) -> None:
        """Create the folder of a checkpoint and check that its disk has room. Only rank 0 calls it.

        Raises:
            UserError: the disk has less than `needed` bytes free; there is no folder then.
        """
        partial = self._partial(step)
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
        self._writing = _Writing(step, lambda: self._write(step, state, document, saved))

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        error = writing.join()
        if error is not None:
            whole = saved_steps(self.path)
            last = f"the last whole one is {checkpoint_folder(self.path, whole[-1])}" if whole else "there is no other"
            raise UserError(
                f"checkpoint {checkpoint_folder(self.path, writing.step)} could not be written: {error}; {last}"
            ) from error

    def finish(self) -> None:
        """Wait for the last checkpoint at the end of a failed run; an error of writing was logged."""
        if self._writing is not None:
            self._writing.join()

    def _partial(self, step: int) -> Path:
        folder = checkpoint_folder(self.path, step)
        return folder.with_name(folder.name + PARTIAL)

    def _write(self, step: int, state: State, document: dict[str, Any], saved: Callable[[float], None]) -> None:
        """Write a checkpoint and give it its name when all of it is on disk. The thread of every rank calls it.

        Raises:
            Exception: any rank failed; raised on all ranks.
        """
        partial, started = self._partial(step), time.monotonic()
        planner = PiecesSavePlanner(self.ranks.progress)
        save(state, storage_writer=TensorFolderWriter(partial), planner=planner, process_group=self._group)
        records = self._on_all_ranks(lambda: describe_files(partial.glob(f"__{self.ranks.rank}_*")))
        self._on_all_ranks(lambda: self._complete(step, document, records) if self.ranks.is_main else {})
        if self.ranks.is_main:
            seconds = time.monotonic() - started
            logger.info("saved checkpoint %s (%.1f s beside the training)", checkpoint_folder(self.path, step), seconds)
            saved(seconds)

    def _complete(self, step: int, document: dict[str, Any], records: list[Record]) -> Record:
        """Write the JSON files, rename the folder and delete superseded checkpoints; return the record of all files."""
        self._check()
        partial = self._partial(step)
        write_atomic(partial / STATE, json.dumps(document, indent=1))
        record = {
            name: file for part in (*records, describe_files(partial.glob("*.json"))) for name, file in part.items()
        }
        write_record(partial, record)
        partial.rename(checkpoint_folder(self.path, step))
        flush_folder(self.path)
        every = self.config.keep_every_steps
        for old in saved_steps(self.path)[: -self.config.keep]:
            if not every or old % every:
                shutil.rmtree(checkpoint_folder(self.path, old))
        return record

    def _on_all_ranks(self, work: Callable[[], Record]) -> list[Record]:
        """Run a function on every rank and return all results; an error of any rank is raised on all."""
        result: Record | str
        try:
            result = work()
        except (OSError, UserError) as error:
            result = f"rank {self.ranks.rank}: {error}"
        gathered: list[Any] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(gathered, result, group=self._group)
        if failed := [entry for entry in gathered if isinstance(entry, str)]:
            raise OSError("; ".join(failed))
        return gathered


class _Writing:
    """Thread that writes a checkpoint."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        self.step = step
        self._write = write
        self._error: Exception | None = None
        # The process may end without it: after the death of another rank nobody may answer.
        self._thread = threading.Thread(target=self._run, name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def join(self) -> Exception | None:
        """Wait for the end of the thread, and return the error that ended it."""
        self._thread.join()
        return self._error

    def _run(self) -> None:
        try:
            self._write()
        except CheckpointException as error:
            self._error = OSError(reasons(error))
        except Exception as error:
            self._error = error
        if self._error is not None:
            logger.error("the checkpoint after step %d could not be written: %s", self.step, self._error)
