"""Fine-tuning for the classification of labelled videos: the task, and its entry point."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from mvd_scale.checkpoints.native import describe_weights
from mvd_scale.config import FinetuneRecipe
from mvd_scale.config.data import DataConfig
from mvd_scale.data.indexing.build import load_source
from mvd_scale.data.loaders.clip_loader import ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.evaluation.center_clip_pass import CenterClipEvaluator
from mvd_scale.evaluation.labels import check_labels, class_count
from mvd_scale.models import Classifier
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.finetuning.classification_loss import ClassificationLoss
from mvd_scale.training.finetuning.finetune import FinetuneTask, run_finetune


def run_classification(recipe: FinetuneRecipe) -> None:
    """Run a recipe of fine-tuning; see `run_finetune`."""
    run_finetune(ClassificationTask(recipe, RunFolder(recipe.run.folder)))


class ClassificationTask(FinetuneTask[FinetuneRecipe]):
    """Task of classifying whole videos."""

    figure = "top1"
    weights = "classifier.safetensors"

    def index(self) -> Manifest:
        """Index the videos of training and validation, and check their labels."""
        recipe = self.recipe
        manifest = load_source(recipe.data, self.folder.index)
        classes = class_count(manifest, recipe.classifier.classes)
        check_labels(manifest, classes, "data.source", every_class=True)
        if recipe.validation is not None:
            cache = self.folder.tested.parent
            cache.mkdir(exist_ok=True)
            told, upright = recipe.validation, recipe.data.upright_stills
            source = DataConfig(source=told.source, root=told.root, upright_stills=upright)
            tested = load_source(source, cache)
            check_labels(tested, classes, "validation.source", like=manifest)
            tested.save(self.folder.tested)
        return manifest

    def read(self) -> Manifest:
        """Read the manifest, which has one row per video, and the number of classes."""
        self.manifest = Manifest.load(self.folder.manifest)
        self.classes = class_count(self.manifest, self.recipe.classifier.classes)
        return self.manifest

    def create_model(self) -> Classifier:
        """Create the classifier with random weights."""
        head = self.recipe.classifier
        return Classifier(self.recipe.model, self.classes, dropout=head.dropout, init_scale=head.init_scale)

    def describe(self) -> dict[str, str]:
        """Describe the model by its shape, the names of the classes and the test views."""
        return describe_weights(self.recipe.model, classes=self.manifest.classes, views=self.recipe.test)

    def data_digests(self) -> dict[str, Any]:
        """Compute digests of the videos and of their labels."""
        digest = hashlib.sha256()
        for rows in self.manifest.usable_blocks():
            digest.update(self.manifest.label[rows].tobytes())
        return {"videos": self.manifest.digest, "labels": digest.hexdigest()[:16]}

    def objective(self) -> ClassificationLoss:
        """Create the cross-entropy loss."""
        return ClassificationLoss(self.recipe, self.classes)

    def load(self, ranks: Ranks, steps: range) -> ClipLoader:
        """Create the loader of training clips."""
        return ClipLoader.for_run(
            self.manifest, self.recipe, ranks.data_rank, steps, quarantine=self.folder.open_quarantine()
        )

    def measure(self, ranks: Ranks) -> Callable[[Any], float]:
        """Create the function that computes top-1 accuracy on the clip in the middle of each validation video.

        A video that cannot be decoded counts as wrong.
        """
        assert self.recipe.validation is not None
        manifest = Manifest.load(self.folder.tested)
        # The count includes the labelled videos that the index excluded, so that they count as wrong too.
        videos = int((manifest.label >= 0).sum())
        evaluator = CenterClipEvaluator(
            manifest, self.recipe.data, self.recipe.model, ranks, self.recipe.validation.batch
        )

        def top1(model: Any) -> float:
            scores, labels, decoded = evaluator(lambda pixels: model(pixels).float())
            return int(((scores.argmax(1) == labels) & decoded).sum()) / videos

        return top1
