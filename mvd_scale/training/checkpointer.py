"""Checkpoints of a run for resuming: complete or absent, only the newest are kept, found automatically."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mvd_scale.checkpoints.reading import TORN
from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import Recipe, RunRecipe
from mvd_scale.config.deepspeed import zero_stage
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.checkpoint_files import find_damage, record_files
from mvd_scale.training.deepspeed_engine import full_parameters
from mvd_scale.training.ema import ModelEma
from mvd_scale.utils.io import write_atomic

logger = logging.getLogger("mvd_scale")

_PREFIX = "step_"
_PARTIAL = ".partial"
_LAYOUT = "layout.json"


class Checkpointer:
    """Checkpoints of one run: `step_N` was written to its end; `step_N.partial` was not; `step_N.torn` lost files."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: RunRecipe,
        ranks: Ranks,
        origin: dict[str, Any],
        steps_per_epoch: int,
        averages: Sequence[ModelEma],
        export: Callable[[Any, Path], None],
    ) -> None:
        self.path = folder.checkpoints
        self.recipe = recipe
        self.ranks = ranks
        self.origin = origin
        self.averages = averages
        self._export = export
        every = recipe.checkpoints
        by_epoch = every.every_epochs and max(round(every.every_epochs * steps_per_epoch), 1)
        self.intervals = [interval for interval in (by_epoch, every.every_steps) if interval]
        self.saved_at = time.monotonic()

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint must be saved after this step by the count of steps; the same on all ranks."""
        return any(step % interval == 0 for interval in self.intervals)

    def time_to_save(self) -> bool:
        """Whether a checkpoint must be saved by the time since the last one; by this rank's clock."""
        minutes = self.recipe.checkpoints.every_minutes
        return minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    def save(self, engine: Any, step: int) -> None:
        """Save the engine after `step` optimizer steps. All ranks must call it."""
        name = f"{_PREFIX}{step:08d}"
        partial = self.path / (name + _PARTIAL)
        if self.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()
        engine.save_checkpoint(str(self.path), tag=partial.name, client_state={"step": step}, save_latest=False)
        self.export(engine, partial)
        if self.ranks.is_main:
            write_atomic(partial / _LAYOUT, json.dumps(self._layout()))
            record_files(partial)
        torch.distributed.barrier()
        if self.ranks.is_main:
            partial.rename(self.path / name)
            for old in self._steps()[: -self.recipe.checkpoints.keep]:
                shutil.rmtree(self.path / f"{_PREFIX}{old:08d}")
        torch.distributed.barrier()
        self.saved_at = time.monotonic()
        logger.info("saved checkpoint %s", self.path / name)

    def resume(self, engine: Any) -> int:
        """Load the newest checkpoint that is whole, and set torn ones aside. All ranks must call it.

        Returns:
            the number of optimizer steps of the checkpoint; 0 without one.

        Raises:
            UserError: the checkpoint was written with another number of ranks, ZeRO stage or precision, other videos or
                other teachers; or there are checkpoints, and none of them is whole.
        """
        step = run_on_rank0(self.ranks, "resumed", self._set_torn_aside)
        if step is None:
            return 0
        tag = f"{_PREFIX}{step:08d}"
        stands = json.loads((self.path / tag / _LAYOUT).read_text())
        if stands != self._layout():
            differing = [key for key, value in self._layout().items() if stands.get(key) != value]
            there, here = (
                ", ".join(f"{key} {layout.get(key)}" for key in differing) for layout in (stands, self._layout())
            )
            raise UserError(
                f"checkpoint {self.path / tag} was written with {there}; this command has {here}. "
                "Resume with the same settings, or start a new run in another `--run.folder`"
            )
        loaded, _ = engine.load_checkpoint(str(self.path), tag=tag)
        if loaded is None:
            raise UserError(
                f"checkpoint {self.path / tag} is incomplete; remove that folder to resume from the one before it"
            )
        for average in self.averages:
            average.load(self.path / tag)
        logger.info("resumed from %s", self.path / tag)
        return step

    def export(self, engine: Any, folder: Path) -> None:
        """Write the weights of the model and of its moving averages to a folder, float32. All ranks must call it."""
        self._export(engine, folder)
        for average in self.averages:
            average.save(folder)

    def clear_partial(self) -> None:
        """Remove checkpoints that a killed run did not finish writing."""
        for partial in self.path.glob(f"{_PREFIX}*{_PARTIAL}"):
            shutil.rmtree(partial)

    def _set_torn_aside(self) -> int | None:
        """Rename torn checkpoints, so that none of them is taken again, until one is whole.

        Returns:
            step of the newest whole checkpoint; None if there are no checkpoints.

        Raises:
            UserError: none is whole; then none is renamed.
        """
        torn: dict[Path, str] = {}
        for step in reversed(self._steps()):
            folder = self.path / f"{_PREFIX}{step:08d}"
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

    def _layout(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks.world_size,
            "ZeRO stage": zero_stage(self.recipe),
            "precision": self.recipe.training.precision,
            **self.origin,
        }

    def _steps(self) -> list[int]:
        digits = "[0-9]" * 8
        return sorted(int(path.name.removeprefix(_PREFIX)) for path in self.path.glob(_PREFIX + digits))


def export_student(engine: Any, folder: Path, recipe: Recipe, ranks: Ranks) -> None:
    """Write `student.safetensors` (all weights) and `encoder.safetensors`, float32. All ranks must call it."""
    tensors = {}
    for name, full in full_parameters(engine):
        if ranks.is_main:
            tensors[name] = full
    if ranks.is_main:
        prefix = "encoder."
        encoder = {name.removeprefix(prefix): full for name, full in tensors.items() if name.startswith(prefix)}
        save_weights(folder / "encoder.safetensors", encoder, recipe.model)
        decoders = {name: target.decoder for name, target in recipe.targets.items() if target.decoder is not None}
        save_weights(folder / "student.safetensors", tensors, recipe.model, decoders)
