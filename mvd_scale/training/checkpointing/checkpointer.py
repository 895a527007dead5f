"""Checkpoints of a run: written beside the training, complete or absent, checked before they are resumed from.

A checkpoint is a folder `step_N`:

    tensors.json, __RANK_0.distcp    weights, moments, moving averages: `engine_state`, `checkpoints.tensor_folder`
    state.json                       numbers of the state, digests of data and teachers, metadata of the weights
    files.json                       sizes and SHA-256 of the files above

See `folders` for other suffixes. Nothing that is read from it depends on the number of ranks, the ZeRO stage, the
precision or the micro batch of the run that wrote it. Several students are saved at the same steps, each in the folder
of its own run, as if it were trained alone.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mvd_scale.checkpoints.tensor_folder import STATE, load_pieces
from mvd_scale.config import RunRecipe
from mvd_scale.config.deepspeed import zero_stage
from mvd_scale.distributed.health.progress import WRITING_PATIENCE
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.checkpointing.engine_state import Counters, engine_state, read_counters, restore_engine
from mvd_scale.training.checkpointing.files import recorded_bytes
from mvd_scale.training.checkpointing.folders import PARTIAL, PREFIX, checkpoint_folder
from mvd_scale.training.checkpointing.host_copy import HostCopy
from mvd_scale.training.checkpointing.pieces import PiecesLoadPlanner, State
from mvd_scale.training.checkpointing.selection import Retention, choose_resumed_step
from mvd_scale.training.checkpointing.writer import CheckpointWriter
from mvd_scale.utils.events import EventLog

if TYPE_CHECKING:
    from mvd_scale.training.trained_model import TrainedModel

logger = logging.getLogger("mvd_scale")

_VERSION = 1

_PATIENCE = 3.0
"""Seconds that a checkpoint gets to its end after an error, which may have ended a rank that the others wait for."""


@dataclass(frozen=True)
class SavedModel:
    """Model whose state is saved, and the folder of its run."""

    folder: RunFolder
    recipe: RunRecipe
    model: TrainedModel

    origin: dict[str, Any] = field(default_factory=dict)
    """Digests of data and weights; a checkpoint is resumed only with equal ones."""

    weights: dict[str, str] = field(default_factory=dict)
    """Metadata of the model's weights, see `describe_weights`."""


class Checkpointer:
    """Writer and reader of the checkpoints of one run. All ranks create one and call its methods.

    Args:
        models: the model of the run, or its students; all are saved at the same steps.
        recipe: recipe of the run.
        ranks: this process among all.
        steps_per_epoch: optimizer steps of an epoch.
    """

    def __init__(self, models: Sequence[SavedModel], recipe: RunRecipe, ranks: Ranks, steps_per_epoch: int) -> None:
        self.recipe = recipe
        self.ranks = ranks
        every = recipe.checkpoints
        by_epoch = every.every_epochs and max(round(every.every_epochs * steps_per_epoch), 1)
        self.intervals = [interval for interval in (by_epoch, every.every_steps) if interval]
        self.saved_at = time.monotonic()
        self.paths = [model.folder.checkpoints for model in models]
        retention = Retention(self.paths, every)
        self._models = [_ModelCheckpoints(model, ranks, retention) for model in models]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for a checkpoint that is being written; after an error not for long, as one of the ranks may be gone."""
        if error is None:
            self.wait_for_last()
        else:
            for model in self._models:
                model.writer.finish(_PATIENCE)

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
        states = [model.state() for model in self._models]
        needed = sum(pieces.whole_bytes for state in states for pieces in state.values())
        run_on_rank0(
            self.ranks, f"room for step {step}", lambda: self._make_room(step, needed), patience=WRITING_PATIENCE
        )
        copies = [model.copy(state) for model, state in zip(self._models, states, strict=True)]
        self.saved_at = time.monotonic()
        for model, copied in zip(self._models, copies, strict=True):
            model.start(step, copied, self.saved_at - began)

    def _make_room(self, step: int, needed: int) -> None:
        """Check that the disk has room for the checkpoints of all students before any of them is written."""
        for model in self._models:
            model.folder.check_lease()
            model.writer.make_room(step, needed)

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the last checkpoint could not be written; `wait` raises the error."""
        return any(model.writer.has_failed for model in self._models)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. All ranks must call it.

        Raises:
            UserError: it could not be written.
        """
        errors = []
        for model in self._models:
            try:
                model.writer.wait()
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def wait_for_last(self) -> None:
        """Wait as `wait` does, at the end of a run: as patiently as for writing beside the training.

        Raises:
            UserError: see `wait`.
        """
        with self.ranks.progress.passing("save", patience=WRITING_PATIENCE):
            self.wait()

    def resume(self) -> int:
        """Load the newest checkpoint that is whole for all students, and set newer ones aside. All ranks must call it.

        Returns:
            the number of optimizer steps of the checkpoint; 0 without one.

        Raises:
            UserError: the checkpoint was written with other videos or other teachers; or there are checkpoints, and
                none of them is whole.
        """
        step: int | None = run_on_rank0(self.ranks, "resumed", lambda: choose_resumed_step(self.paths))
        if step is None:
            return 0
        for model in self._models:
            model.load(step)
        return step

    def clear_partial(self) -> None:
        """Remove checkpoints that a killed run did not finish writing."""
        for path in self.paths:
            for partial in path.glob(f"{PREFIX}*{PARTIAL}"):
                shutil.rmtree(partial)


class _ModelCheckpoints:
    """State of one model to and from the checkpoints of its run."""

    def __init__(self, model: SavedModel, ranks: Ranks, retention: Retention) -> None:
        self.folder = model.folder
        self.path = model.folder.checkpoints
        self.writer = CheckpointWriter(self.path, ranks, retention, model.folder.check_lease)
        self._saved, self._model = model, model.model
        self._ranks = ranks
        self._host = HostCopy()
        self._events = EventLog(model.folder.events)

    def state(self) -> State:
        """Collect the parts of weights, moments and averages that this rank saves; they share memory with them."""
        state = engine_state(self._model.engine)
        for average in self._model.averages:
            state |= average.share_of_state()
        return state

    def copy(self, state: State) -> State:
        """Copy a state to host memory."""
        return self._host.copy(state)

    def start(self, step: int, copied: State, waited: float) -> None:
        """Begin to write a copied state; `waited` is the time in seconds that the step waited."""
        self.writer.start(step, copied, self._document(step), lambda written: self._record_save(step, waited, written))

    def load(self, step: int) -> None:
        """Load the checkpoint of a step. All ranks must call it.

        Raises:
            UserError: it was written with other data or weights.
        """
        model, recipe, folder = self._model, self._saved.recipe, checkpoint_folder(self.path, step)
        document = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self._check_origin(folder, document["origin"])
        state = engine_state(model.engine)
        for average in model.averages:
            state |= average.state()
        load_pieces(state, folder, PiecesLoadPlanner())
        _, accumulation = recipe.micro_batch_and_accumulation(self._ranks.world_size)
        batch = recipe.training.global_batch
        restore_engine(model.engine, state, Counters(**document["counters"]), step, batch, accumulation)
        for average in model.averages:
            average.publish()
        before, now = document["layout"], self._layout()
        changes = "".join(f"; {key} {now[key]}, before {before[key]}" for key in now if before[key] != now[key])
        logger.info("resumed from %s%s", folder, changes)
        if self._ranks.is_main:
            self._events.write("resume", step=step, checkpoint=str(folder), clips=document["clips"], before=before)

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

    def _document(self, step: int) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "step": step,
            "clips": step * self._saved.recipe.training.global_batch,
            "counters": read_counters(self._model.engine).to_json(),
            "origin": self._saved.origin,
            "weights": self._saved.weights,
            "layout": self._layout(),
        }

    def _layout(self) -> dict[str, Any]:
        """How the run is cut, which may differ when it is resumed."""
        recipe, world_size = self._saved.recipe, self._ranks.world_size
        micro, _ = recipe.micro_batch_and_accumulation(world_size)
        return {
            "ranks": world_size,
            "ZeRO stage": zero_stage(recipe),
            "precision": recipe.training.precision,
            "micro batch": micro,
        }

    def _check_origin(self, folder: Path, origin: dict[str, Any]) -> None:
        here = json.loads(json.dumps(self._saved.origin))
        differing = [key for key in here.keys() | origin.keys() if origin.get(key) != here.get(key)]
        if differing:
            there, now = (", ".join(f"{key} {side.get(key)}" for key in sorted(differing)) for side in (origin, here))
            raise UserError(
                f"checkpoint {folder} was written with {there}; this command has {now}. "
                "Resume with the same data and weights, or start a new run in another `--run.folder`"
            )
