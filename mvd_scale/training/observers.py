"""What a person judges a run by, besides its losses: pictures of predictions, and a probe on labelled videos.

Neither changes the run: both look at the student between two steps and draw no random number.
"""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from mvd_scale.config import Recipe
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.training import ProbeConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.index import open_source
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.view_loader import ViewLoader, view_items
from mvd_scale.errors import UserError
from mvd_scale.evaluation.features import pooled
from mvd_scale.evaluation.picture import compose, fresh_batch, panels_from
from mvd_scale.evaluation.probes import linear_classifier, nearest_neighbours, top1
from mvd_scale.targets import Target
from mvd_scale.training.engine import Ranks
from mvd_scale.training.metrics import MetricWriter
from mvd_scale.training.run_folder import RunFolder

logger = logging.getLogger("mvd_scale")


class Observer(ABC):
    """Looks at the student every few steps. All ranks take part."""

    def __init__(self, every_epochs: float, steps_per_epoch: int) -> None:
        self.interval = max(round(every_epochs * steps_per_epoch), 1)

    @abstractmethod
    def observe(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Look at the student after `step` optimizer steps."""

    def close(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Finish what is still written."""


class Observers:
    """All observers of a run."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for observer in self.observers:
                stack.callback(observer.close)

    @torch.no_grad()
    def observe(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Let those look whose turn it is."""
        due = [observer for observer in self.observers if step % observer.interval == 0]
        if due:
            engine.eval()
            for observer in due:
                observer.observe(engine, step, writer)
            engine.train()


class Pictures(Observer):
    """Frames, mask, and each target beside its prediction, for the same clips every time.

    The device computes between two steps; another thread draws and writes.
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

    def observe(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Predict the clips on all ranks, and draw them on the first."""
        if self._batch is None:
            assert self.recipe.logging.pictures is not None
            clips = self.recipe.logging.pictures.clips
            self._batch = fresh_batch(self.recipe, self.manifest, self.targets, clips, self.ranks.device)
        batch = self._batch
        predictions = engine(batch.pixels, batch.visible, batch.masked)
        pairs = {name: (target.features(batch), predictions[name]) for name, target in self.targets.items()}
        if self.ranks.first:
            self.close()
            on_host = {name: (truth.cpu(), guess.cpu()) for name, (truth, guess) in pairs.items()}
            self._drawn = self._thread.submit(self._draw, on_host, step, writer)

    def _draw(self, pairs: dict[str, tuple[Tensor, Tensor]], step: int, writer: MetricWriter) -> None:
        assert self._batch is not None
        picture = compose(panels_from(pairs, self.targets, self._batch, self.recipe))
        self.folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(self.folder / f"step_{step:08d}.png")
        writer.show(step, "predictions", picture)

    def close(self) -> None:
        """Wait for the last picture."""
        if self._drawn is not None:
            try:
                self._drawn.result()
            except (OSError, RuntimeError) as error:
                # A full disk, or features that are not finite: no reason to end a run.
                logger.warning("no picture could be drawn: %s", error)
            self._drawn = None


class Probe(Observer):
    """Accuracy on labelled videos by the pooled features of the frozen encoder."""

    def __init__(self, recipe: Recipe, folder: RunFolder, ranks: Ranks, steps_per_epoch: int) -> None:
        config = recipe.logging.probe
        assert config is not None
        super().__init__(config.every_epochs, steps_per_epoch)
        self.config = config
        self.model = recipe.model
        self.data = recipe.data
        self.views = ViewsConfig(stride=recipe.data.stride, clips=1, crops=1)
        self.report = folder.probe
        self.ranks = ranks
        self.train, self.test = (
            Manifest.load(folder.path / part / "manifest.parquet") for part in ("probe_train", "probe_test")
        )

    def observe(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Encode all videos, each on one rank, and classify them on the first."""
        known, labels = self._encode(engine, self.train)
        tested, truth = self._encode(engine, self.test)
        if not self.ranks.first:
            return
        classes = len(self.train.classes)
        if self.config.kind == "knn":
            scores = nearest_neighbours(known, labels, tested, classes=classes, neighbours=self.config.neighbours)
        else:
            scores = linear_classifier(known, labels, tested, classes=classes)
        accuracy = top1(scores, truth)
        with self.report.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": self.config.kind, "top1": accuracy}) + "\n")
        writer.show(step, f"probe/{self.config.kind}_top1", accuracy)
        logger.info("step %d  %s probe: top-1 %.1f %% of %d videos", step, self.config.kind, 100 * accuracy, len(truth))

    def _encode(self, engine: Any, manifest: Manifest) -> tuple[Tensor, Tensor]:
        """Features, float32 (X, D), and labels of the labelled videos that can be decoded; on every rank."""
        items = view_items(manifest, self.views, frames=self.model.frames)
        items = items[manifest.label[items[:, 0]] >= 0]
        mine = items[self.ranks.rank :: self.ranks.world_size]
        features, labels = [], []
        for pixels, known in self._batches(manifest, items, mine):
            encoded = pooled(engine.module.encoder(pixels), self.model.grid, "clip").float()
            features.append(encoded[: len(known)][known >= 0])
            labels.append(known[known >= 0])
        return _gathered(torch.cat(features), self.ranks), _gathered(torch.cat(labels), self.ranks)

    def _batches(
        self, manifest: Manifest, items: NDArray[np.int64], mine: NDArray[np.int64]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As many batches on every rank, since at ZeRO stage 3 they encode together: clips, and labels or -1."""
        shape = (1, self.model.frames, self.model.input_size, self.model.input_size, 3)
        nothing = torch.zeros(shape, dtype=torch.uint8, device=self.ranks.device)
        most = math.ceil(math.ceil(len(items) / self.ranks.world_size) / self.config.batch)
        loader = ViewLoader(
            manifest,
            self.data.model_copy(update={"workers": 0}),
            self.views,
            mine,
            frames=self.model.frames,
            side=self.model.input_size,
            batch=self.config.batch,
            world_size=self.ranks.world_size,
            device=self.ranks.device,
        )
        with loader:
            for batch in loader:
                most -= 1
                known = torch.where(batch.decoded.to(batch.labels.device), batch.labels, -1)
                yield batch.pixels.flatten(0, 2), known
        for _ in range(most):
            yield nothing, torch.full((1,), -1, device=self.ranks.device)


def open_probe(config: ProbeConfig, folder: RunFolder) -> None:
    """Index the videos of a probe into a run's folder. Rank 0's part.

    Raises:
        UserError: they have no labels, or classes to test on that are not learnt.
    """
    manifests = []
    for part, source in (("probe_train", config.train), ("probe_test", config.test)):
        cache = folder.path / part
        cache.mkdir(exist_ok=True)
        manifest = open_source(DataConfig(source=source, root=config.root), cache)
        if not manifest.classes or not (manifest.label[manifest.usable] >= 0).any():
            raise UserError(f"logging.probe: {source} has no labelled videos; class folders or a list give labels")
        manifest.save(cache / "manifest.parquet")
        manifests.append(manifest)
    train, test = manifests
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"logging.probe: {config.train} and {config.test} have not the same classes in the same order"
            + (f"; in one only are {', '.join(only[:5])}" if only else "")
        )


def _gathered(mine: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks, one rank after the other; they may have different numbers of them."""
    count = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.empty_like(count) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(counts, count)
    most = int(torch.cat(counts).max())
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
