"""Validation: periodic measurement of a metric on held-out data, and storage of the best weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvd_scale.distributed.health.progress import WRITING_PATIENCE
from mvd_scale.distributed.process_group import Ranks, run_on_rank0
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.callbacks import Callback
from mvd_scale.training.metrics.writer import MetricWriter
from mvd_scale.utils.io import append_json_line, read_metrics

logger = logging.getLogger("mvd_scale")


class ValidationCallback(Callback):
    """Callback that measures a metric of the model every few epochs and stores the best weights.

    Args:
        every_epochs: epochs between two measurements.
        steps_per_epoch: optimizer steps per epoch.
        name: name of the metric, a share (0 to 1); higher is better.
        measure: function from a model to the metric; all ranks call it.
        folder: run folder for `validation.jsonl` and `best.safetensors`.
        ranks: this process among all.
        averaged: moving average of the weights, or None. It is measured too, and its metric decides what is best.
        keep: function that writes the decisive weights to a folder and returns their path; all ranks call it.
    """

    def __init__(
        self,
        every_epochs: float,
        steps_per_epoch: int,
        name: str,
        measure: Callable[[Any], float],
        folder: RunFolder,
        ranks: Ranks,
        averaged: nn.Module | None,
        keep: Callable[[Any, Path], Path],
    ) -> None:
        super().__init__(every_epochs, steps_per_epoch)
        self.name = name
        self.measure = measure
        self.folder = folder
        self.ranks = ranks
        self.averaged = averaged
        self.keep = keep

    def on_step_end(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Measure the model, and store its weights if they are the best so far."""
        values = {self.name: self.measure(engine)}
        if self.averaged is not None:
            values[f"{self.name}_average"] = self.measure(self.averaged)
        judged = list(values.values())[-1]
        best = run_on_rank0(self.ranks, f"best before {step}", lambda: self._best(step), patience=WRITING_PATIENCE)
        if judged > best:
            self._keep(engine)
        if self.ranks.is_main:
            append_json_line(self.folder.validation, {"step": step, **values, "judged": judged})
            for name, value in values.items():
                writer.show(step, f"validation/{name}", value)
            text = "  ".join(f"{name} {100 * value:.1f} %" for name, value in values.items())
            logger.info("step %d  validation: %s  (best so far %.1f %%)", step, text, 100 * max(best, judged))

    def _best(self, step: int) -> float:
        """Best value before a step; later lines are from a killed run that went beyond its checkpoint."""
        past = read_metrics(self.folder.validation) if self.folder.validation.is_file() else []
        return max((reading["judged"] for reading in past if reading["step"] < step), default=-1.0)

    def _keep(self, engine: Any) -> None:
        """Write `best.safetensors`; the file is renamed into place, so it is never partial."""
        partial = self.folder.path / "best.partial"
        if self.ranks.is_main:
            partial.mkdir(exist_ok=True)
        torch.distributed.barrier()
        written = self.keep(engine, partial)
        if self.ranks.is_main:
            os.replace(written, self.folder.best)
            partial.rmdir()
