"""Periodic callbacks of a run: pictures of predictions, and a probe on labelled videos.

They do not change the run: they use the student between two steps, without gradients and without random numbers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor

from mvd_scale.config import Recipe
from mvd_scale.config.data import DataConfig
from mvd_scale.config.training import ProbeConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.indexing.build import load_source
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.evaluation.center_clip_pass import CenterClipEvaluator
from mvd_scale.evaluation.features import pool_tokens
from mvd_scale.evaluation.frozen_classifiers import linear_classifier, nearest_neighbours, top1
from mvd_scale.run_dir import RunFolder
from mvd_scale.targets import Target
from mvd_scale.training.metrics.writer import MetricWriter
from mvd_scale.utils.io import append_json_line
from mvd_scale.visualization.predictions import compose, make_panels, visualization_batch

if TYPE_CHECKING:
    from mvd_scale.training.trained_model import TrainedModel

logger = logging.getLogger("mvd_scale")


class Callback(ABC):
    """Base class of callbacks that use the student every few steps, on all ranks."""

    def __init__(self, every_epochs: float, steps_per_epoch: int) -> None:
        self.interval = max(round(every_epochs * steps_per_epoch), 1)

    @abstractmethod
    def on_step_end(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Use the student after `step` optimizer steps. All ranks must call it."""

    def close(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Wait for output that is still being written."""


class CallbackList:
    """Context manager that runs the observers of a run and closes them at the end.

    Args:
        callbacks: each model of the run with its observers.
    """

    def __init__(self, callbacks: Sequence[tuple[TrainedModel, Sequence[Callback]]]) -> None:
        self.callbacks = callbacks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for _, callbacks in self.callbacks:
                for callback in callbacks:
                    stack.callback(callback.close)

    @torch.no_grad()
    def on_step_end(self, step: int, writer: MetricWriter) -> None:
        """Run the observers whose interval ends with this step, with their model in evaluation mode."""
        for model, callbacks in self.callbacks:
            due = [callback for callback in callbacks if step % callback.interval == 0]
            if due:
                model.engine.eval()
                for callback in due:
                    callback.on_step_end(model.engine, step, writer.named(model.metrics))
                model.engine.train()


class PredictionImages(Callback):
    """Observer that draws frames, mask, and each target beside its prediction, always for the same clips.

    The device computes between two steps; another thread draws and writes the picture.
    """

    def __init__(
        self,
        recipe: Recipe,
        manifest: Manifest,
        targets: dict[str, Target],
        folder: RunFolder,
        ranks: Ranks,
        steps_per_epoch: int,
    ) -> None:
        assert recipe.logging.pictures is not None
        super().__init__(recipe.logging.pictures.every_epochs, steps_per_epoch)
        self.recipe = recipe
        self.manifest = manifest
        self.targets = targets
        self.folder = folder.pictures
        self.ranks = ranks
        self._batch: ClipBatch | None = None
        self._thread = ThreadPoolExecutor(1)
        self._drawn: Future[None] | None = None

    def on_step_end(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Predict the clips on all ranks, and draw them on rank 0."""
        if self._batch is None:
            assert self.recipe.logging.pictures is not None
            clips = self.recipe.logging.pictures.clips
            self._batch = visualization_batch(self.recipe, self.manifest, self.targets, clips, self.ranks.device)
        batch = self._batch
        predictions = engine(batch.pixels, batch.visible, batch.masked)
        pairs = {name: (target.features(batch), predictions[name]) for name, target in self.targets.items()}
        if self.ranks.is_main:
            self.close()
            on_host = {name: (truth.cpu(), guess.cpu()) for name, (truth, guess) in pairs.items()}
            self._drawn = self._thread.submit(self._draw, on_host, step, writer)

    def _draw(self, pairs: dict[str, tuple[Tensor, Tensor]], step: int, writer: MetricWriter) -> None:
        assert self._batch is not None
        picture = compose(make_panels(pairs, self.targets, self._batch, self.recipe))
        self.folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(self.folder / f"step_{step:08d}.png")
        writer.show(step, "predictions", picture)

    def close(self) -> None:
        """Wait until the last picture is written."""
        if self._drawn is not None:
            try:
                self._drawn.result()
            except (OSError, RuntimeError) as error:
                # A full disk, or features that are not finite, must not end the run.
                logger.warning("the picture of predictions could not be written: %s", error)
            self._drawn = None


class ProbeCallback(Callback):
    """Observer that measures the accuracy of a small classifier on pooled features of labelled videos."""

    def __init__(self, recipe: Recipe, folder: RunFolder, ranks: Ranks, steps_per_epoch: int) -> None:
        config = recipe.logging.probe
        assert config is not None
        super().__init__(config.every_epochs, steps_per_epoch)
        self.config = config
        self.grid = recipe.model.grid
        self.results_file = folder.probe
        self.ranks = ranks
        manifests = [Manifest.load(folder.path / part / "manifest.parquet") for part in ("probe_train", "probe_test")]
        self.classes = len(manifests[0].classes)
        self.sweeps = [
            CenterClipEvaluator(manifest, recipe.data, recipe.model, ranks, config.batch) for manifest in manifests
        ]

    def on_step_end(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Encode all videos, distributed over the ranks, and classify them on rank 0."""

        def encode(pixels: Tensor) -> Tensor:
            return pool_tokens(engine.module.encoder(pixels), self.grid, "clip").float()

        (known, labels, seen), (tested, truth, decoded) = (evaluator(encode) for evaluator in self.sweeps)
        if not self.ranks.is_main:
            return
        known, labels, tested, truth = known[seen], labels[seen], tested[decoded], truth[decoded]
        if self.config.kind == "knn":
            neighbours = self.config.neighbours
            scores = nearest_neighbours(known, labels, tested, classes=self.classes, neighbours=neighbours)
        else:
            scores = linear_classifier(known, labels, tested, classes=self.classes)
        accuracy = top1(scores, truth)
        append_json_line(self.results_file, {"step": step, "kind": self.config.kind, "top1": accuracy})
        writer.show(step, f"probe/{self.config.kind}_top1", accuracy)
        logger.info("step %d  %s probe: top-1 %.1f %% of %d videos", step, self.config.kind, 100 * accuracy, len(truth))


def index_probe_videos(config: ProbeConfig, folders: Sequence[RunFolder]) -> None:
    """Index the videos of a probe in a run's folder. Only rank 0 calls it.

    Args:
        config: probe of the recipe.
        folders: folder of the run, and those of its students, which get the same manifests.

    Raises:
        UserError: the videos have no labels, or training and test videos have different classes.
    """
    manifests = []
    for part, source in (("probe_train", config.train), ("probe_test", config.test)):
        caches = [folder.path / part for folder in folders]
        for cache in caches:
            cache.mkdir(exist_ok=True)
        manifest = load_source(DataConfig(source=source, root=config.root), caches[0])
        if not manifest.classes or not (manifest.label[manifest.usable] >= 0).any():
            raise UserError(f"logging.probe: {source} has no labelled videos; give labels by class folders or a list")
        for cache in caches:
            manifest.save(cache / "manifest.parquet")
        manifests.append(manifest)
    train, test = manifests
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"logging.probe: {config.train} and {config.test} must have the same classes in the same order"
            + (f"; only one of them has {', '.join(only[:5])}" if only else "")
        )
