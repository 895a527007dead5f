"""Checkpoints of a run: written beside the training, complete or absent, checked before they are resumed from.

A checkpoint is a folder `step_N`:

    tensors.json, __RANK_0.distcp    weights, moments, moving averages: `engine_state`, `checkpoints.tensor_folder`
    state.json                       numbers of the state, digests of data and teachers, metadata of the weights
    files.json                       sizes and SHA-256 of the files above

`step_N.partial` was not written to its end; `step_N.torn` lost files or bytes. Nothing that is read from it depends on
the number of ranks, the ZeRO stage, the precision or the micro batch of the run that wrote it.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mvd_scale.checkpoints.reading import TORN
from mvd_scale.checkpoints.tensor_folder import STATE, load_pieces
from mvd_scale.config import RunRecipe
from mvd_scale.config.deepspeed import zero_stage
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.checkpointing.engine_state import Counters, engine_state, read_counters, restore_engine
from mvd_scale.training.checkpointing.files import find_damage, recorded_bytes
from mvd_scale.training.checkpointing.folders import PARTIAL, PREFIX, checkpoint_folder, saved_steps
from mvd_scale.training.checkpointing.host_copy import HostCopy
from mvd_scale.training.checkpointing.pieces import PiecesLoadPlanner
from mvd_scale.training.checkpointing.writer import CheckpointWriter
from mvd_scale.training.ema import ModelEma
from mvd_scale.utils.events import EventLog

logger = logging.getLogger("mvd_scale")

_VERSION = 1

_PATIENCE = 3.0
"""Seconds that a checkpoint gets to its end after an error, which may have ended a rank that the others wait for."""


@dataclass(frozen=True)
class RunState:
    """Content of a checkpoint beside the engine and the averages."""

    origin: dict[str, Any]
    """Digests of data and weights; a checkpoint is resumed only with equal ones."""

    weights: dict[str, str]
    """Metadata of the model's weights, see `describe_weights`."""


class Checkpointer:
    """Writer and reader of the checkpoints of one run. All ranks create one and call its methods.

    Args:
        folder: folder of the run.
        recipe: recipe of the run.
        ranks: this process among all.
        run: digests and metadata to store.
        steps_per_epoch: optimizer steps of an epoch.
        engine: engine of DeepSpeed.
        averages: moving averages of the weights.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: RunRecipe,
        ranks: Ranks,
        run: RunState,
        steps_per_epoch: int,
        engine: Any,
        averages: Sequence[ModelEma],
    ) -> None:
        self.folder = folder
        self.path = folder.checkpoints
        self.recipe = recipe
        self.ranks = ranks
        self.run = run
        self.engine = engine
        self.averages = averages
        every = recipe.checkpoints
        by_epoch = every.every_epochs and max(round(every.every_epochs * steps_per_epoch), 1)
        self.intervals = [interval for interval in (by_epoch, every.every_steps) if interval]
        self.saved_at = time.monotonic()
        self._host = HostCopy()
        self._events = EventLog(folder.events)
        self._writer = CheckpointWriter(self.path, ranks, every, folder.check_lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for a checkpoint that is being written; after an error not for long, as one of the ranks may be gone."""
        if error is None:
            self.wait()
        else:
            self._writer.finish(_PATIENCE)

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint must be saved after this step by the count of steps; the same on all ranks."""
        return any(step % interval == 0 for interval in self.intervals)

    def time_to_save(self) -> bool:
        """Whether a checkpoint must be saved by the time since the last one; by this rank's clock."""
        minutes = self.recipe.checkpoints.every_minutes
        return minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    def save(self, step: int) -> None:
        """Copy the state after `step` optimizer steps to host memory, and begin to write it. All ranks must call it.

        Raises:
            UserError: the disk has no room for it, the checkpoint before it could not be written, or another process
                has taken the run folder over.
        """
        began = time.monotonic()
        self.wait()
        state = engine_state(self.engine)
        for average in self.averages:
            state |= average.share_of_state()
        needed = sum(pieces.whole_bytes for pieces in state.values())
        run_on_rank0(self.ranks, f"room for step {step}", lambda: self._make_room(step, needed))
        copied, document = self._host.copy(state), self._document(step)
        self.saved_at = time.monotonic()
        waited = self.saved_at - began
        self._writer.start(step, copied, document, lambda written: self._record_save(step, waited, written))

    def _make_room(self, step: int, needed: int) -> None:
        self.folder.check_lease()
        self._writer.make_room(step, needed)

    def _record_save(self, step: int, waited: float, written: float) -> None:
        """Write the event of a checkpoint that is on disk; times in seconds: `waited` is what the step waited."""
        folder = checkpoint_folder(self.path, step)
        self._events.write(
            "save",
            step=step,
            checkpoint=str(folder),
            bytes=recorded_bytes(folder),
            seconds_waited=round(waited, 3),
            seconds_written=round(written, 3),
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. All ranks must call it.

        Raises:
            UserError: it could not be written.
        """
        self._writer.wait()

    def resume(self) -> int:
        """Load the newest checkpoint that is whole, and set torn ones aside. All ranks must call it.

        Returns:
            the number of optimizer steps of the checkpoint; 0 without one.

        Raises:
            UserError: the checkpoint was written with other videos or other teachers; or there are checkpoints, and
                none of them is whole.
        """
        step = run_on_rank0(self.ranks, "resumed", self._set_torn_aside)
        if step is None:
            return 0
        folder = checkpoint_folder(self.path, step)
        document = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self._check_origin(folder, document["origin"])
        state = engine_state(self.engine)
        for average in self.averages:
            state |= average.state()
        load_pieces(state, folder, PiecesLoadPlanner())
        _, accumulation = self.recipe.micro_batch_and_accumulation(self.ranks.world_size)
        batch = self.recipe.training.global_batch
        restore_engine(self.engine, state, Counters(**document["counters"]), step, batch, accumulation)
        for average in self.averages:
            average.publish()
        before, now = document["layout"], self._layout()
        changes = "".join(f"; {key} {now[key]}, before {before[key]}" for key in now if before[key] != now[key])
        logger.info("resumed from %s%s", folder, changes)
        if self.ranks.is_main:
            self._events.write("resume", step=step, checkpoint=str(folder), clips=document["clips"], before=before)
        return step

    def clear_partial(self) -> None:
        """Remove checkpoints that a killed run did not finish writing."""
        for partial in self.path.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(partial)

    def _document(self, step: int) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "step": step,
            "clips": step * self.recipe.training.global_batch,
            "counters": read_counters(self.engine).to_json(),
            "origin": self.run.origin,
            "weights": self.run.weights,
            "layout": self._layout(),
        }

    def _layout(self) -> dict[str, Any]:
        """How the run is cut, which may differ when it is resumed."""
        micro, _ = self.recipe.micro_batch_and_accumulation(self.ranks.world_size)
        return {
            "ranks": self.ranks.world_size,
            "ZeRO stage": zero_stage(self.recipe),
            "precision": self.recipe.training.precision,
            "micro batch": micro,
        }

    def _check_origin(self, folder: Path, origin: dict[str, Any]) -> None:
        here = json.loads(json.dumps(self.run.origin))
        differing = [key for key in here.keys() | origin.keys() if origin.get(key) != here.get(key)]
        if differing:
            there, now = (", ".join(f"{key} {side.get(key)}" for key in sorted(differing)) for side in (origin, here))
            raise UserError(
                f"checkpoint {folder} was written with {there}; this command has {now}. "
                "Resume with the same data and weights, or start a new run in another `--run.folder`"
            )

    def _set_torn_aside(self) -> int | None:
        """Rename torn checkpoints, so that none of them is taken again, until one is whole.

        Returns:
            step of the newest whole checkpoint; None if there are no checkpoints.

        Raises:
            UserError: none is whole; then none is renamed.
        """
        torn: dict[Path, str] = {}
        for step in reversed(saved_steps(self.path)):
            folder = checkpoint_folder(self.path, step)
            reason = find_damage(folder)
            if reason is None:
                for old, why in torn.items():
                    aside = old.with_name(old.name + TORN)
                    shutil.rmtree(aside, ignore_errors=True)
                    old.rename(aside)
                    logger.warning(
                        "checkpoint %s is torn: %s. It is now %s; the one before it is used", old, why, aside
                    )
                return step
            torn[folder] = reason
        if torn:
            said = "; ".join(f"{folder.name}: {reason}" for folder, reason in torn.items())
            raise UserError(
                f"no checkpoint in {self.path} is whole ({said}): copy one of them there again, or start a new run in "
                "another `--run.folder`"
            )
        return None
