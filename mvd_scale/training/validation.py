"""Accuracy on labelled videos during fine-tuning; the best weights are kept."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvd_scale.config import FinetuneRecipe
from mvd_scale.data.manifest import Manifest
from mvd_scale.evaluation.sweep import Sweep
from mvd_scale.models import Classifier
from mvd_scale.training.engine import Ranks, first_decides
from mvd_scale.training.metrics import MetricWriter, read_metrics
from mvd_scale.training.observers import Observer
from mvd_scale.training.run_folder import RunFolder

logger = logging.getLogger("mvd_scale")


class Validation(Observer):
    """Each video is tested by the clip in its middle; one that cannot be decoded counts as wrong.

    Args:
        recipe: says which videos and how often.
        folder: gets `validation.jsonl`, and `best.safetensors`.
        ranks: all take part.
        steps_per_epoch: optimizer steps.
        averaged: the moving average of the weights, which is tested too and then is what is kept.
        export: writes the classifier that is trained into a folder; all ranks call it.
        write: writes tensors of a classifier into a file.
    """

    def __init__(
        self,
        recipe: FinetuneRecipe,
        folder: RunFolder,
        ranks: Ranks,
        steps_per_epoch: int,
        averaged: Classifier | None,
        export: Callable[[Any, Path], None],
        write: Callable[[Path, dict[str, Tensor]], None],
    ) -> None:
        config = recipe.validation
        assert config is not None
        super().__init__(config.every_epochs, steps_per_epoch)
        self.folder = folder
        self.ranks = ranks
        self.averaged = averaged
        self.export = export
        self.write = write
        manifest = Manifest.load(folder.path / "validation" / "manifest.parquet")
        # Those that the index left out count as wrong too.
        self.videos = int((manifest.label >= 0).sum())
        self.sweep = Sweep(manifest, recipe.data, recipe.model, ranks, config.batch)

    def observe(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Test the weights, and keep them if none were better."""
        values = {"top1": self._accuracy(engine)}
        if self.averaged is not None:
            values["top1_average"] = self._accuracy(self.averaged)
        judged = values.get("top1_average", values["top1"])
        best = first_decides(self.ranks, f"best before {step}", lambda: self._best(step))
        if judged > best:
            self._keep(engine)
        if self.ranks.first:
            with self.folder.validation.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values, "judged": judged}) + "\n")
            for name, value in values.items():
                writer.show(step, f"validation/{name}", value)
            words = "  ".join(f"{name} {100 * value:.1f} %" for name, value in values.items())
            logger.info("step %d  validation: %s  (best so far %.1f %%)", step, words, 100 * max(best, judged))

    def _accuracy(self, model: Any) -> float:
        scores, labels, decoded = self.sweep(lambda pixels: model(pixels).float())
        return int(((scores.argmax(1) == labels) & decoded).sum()) / self.videos

    def _best(self, step: int) -> float:
        """Best accuracy before a step; a killed run may have gone beyond its checkpoint."""
        past = read_metrics(self.folder.validation) if self.folder.validation.is_file() else []
        return max((reading["judged"] for reading in past if reading["step"] < step), default=-1.0)

    def _keep(self, engine: Any) -> None:
        """Write `best.safetensors`; it appears whole or not at all."""
        partial = self.folder.path / "best.partial"
        if self.ranks.first:
            partial.mkdir(exist_ok=True)
        torch.distributed.barrier()
        if self.averaged is None:
            self.export(engine, partial)
        elif self.ranks.first:
            self.write(partial / self.folder.classifier.name, self.averaged.state_dict())
        if self.ranks.first:
            os.replace(partial / self.folder.classifier.name, self.folder.best)
            partial.rmdir()
