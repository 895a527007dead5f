"""Fine-tuning for action detection: the task, and the entry point of `mvd-scale detect train`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mvd_scale.checkpoints.native import describe_weights
from mvd_scale.config import DetectionRecipe
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.data.indexing.build import load_source
from mvd_scale.data.loaders.view_loader import ViewShape
from mvd_scale.data.manifest import Manifest
from mvd_scale.detection.annotations import read_excluded, read_ground_truth
from mvd_scale.detection.boxes import Boxes
from mvd_scale.detection.key_frames import find_key_frames
from mvd_scale.detection.loader import KeyFrameLoader
from mvd_scale.detection.objective import DetectionLoss
from mvd_scale.detection.people import PersonBoxes
from mvd_scale.detection.testing import BoxScorer, DetectionTestData, make_frame_loader
from mvd_scale.distributed.process_group import Ranks, gather_rows
from mvd_scale.models.detector import Detector
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.finetuning.finetune import FinetuneTask, run_finetune


def run_detection(recipe: DetectionRecipe) -> None:
    """Run a recipe of action detection; see `run_finetune`."""
    run_finetune(DetectionTask(recipe, RunFolder(recipe.run.folder)))


class DetectionTask(FinetuneTask[DetectionRecipe]):
    """Task of action detection on key frames; the boxes of people are given."""

    rows = "key frames"
    figure = "frame_map"
    weights = "detector.safetensors"

    def index(self) -> Manifest:
        """Index the videos of training and validation, and check that all annotations fit them."""
        recipe = self.recipe
        videos = load_source(recipe.data, self.folder.index)
        find_key_frames(self._truth(), videos, recipe.key_frames.starts_at, "key_frames")
        if recipe.validation is not None:
            cache = self.folder.tested.parent
            cache.mkdir(exist_ok=True)
            tested = load_source(DataConfig(source=recipe.validation.source, root=recipe.validation.root), cache)
            tested.save(self.folder.tested)
            DetectionTestData.open(recipe.validation, tested, recipe.detector.classes, "validation")
        return videos

    def read(self) -> Manifest:
        """Read key frames and people; the manifest has one row per key frame."""
        truth, videos = self._truth(), Manifest.load(self.folder.manifest)
        self.key_frames = find_key_frames(truth, videos, self.recipe.key_frames.starts_at, "key_frames")
        self.people = PersonBoxes.of(truth, self.recipe.detector.classes)
        return self.key_frames.manifest

    def create_model(self) -> Detector:
        """Create the detector with random weights."""
        return Detector(self.recipe.model, self.recipe.detector)

    def describe(self) -> dict[str, str]:
        """Describe the model by what the evaluation needs."""
        views = ViewsConfig(stride=self.recipe.data.stride, clips=1, crops=1)
        return describe_weights(self.recipe.model, views=views, detector=self.recipe.detector)

    def data_digests(self) -> dict[str, Any]:
        """Compute digests of the videos and of the boxes with their actions."""
        digest = hashlib.sha256(self.key_frames.centres.tobytes())
        for column in (self.people.frame, self.people.corners, self.people.actions):
            digest.update(column.tobytes())
        return {"videos": self.key_frames.manifest.digest, "people": digest.hexdigest()[:16]}

    def objective(self) -> DetectionLoss:
        """Create the loss: binary cross entropy over actions."""
        return DetectionLoss()

    def load(self, ranks: Ranks, steps: range) -> KeyFrameLoader:
        """Create the loader of clips around the key frames."""
        return KeyFrameLoader.for_training(
            self.key_frames, self.people, self.recipe, ranks.data_rank, steps, quarantine=self.folder.open_quarantine()
        )

    def measure(self, ranks: Ranks) -> Callable[[Any], float]:
        """Create the function that computes the frame mAP of a model; each key frame is scored by one rank."""
        recipe, validation = self.recipe, self.recipe.validation
        assert validation is not None
        test = DetectionTestData.open(
            validation, Manifest.load(self.folder.tested), recipe.detector.classes, "validation"
        )
        mine = np.arange(len(test.key_frames))[ranks.rank :: ranks.world_size]
        data = recipe.data.model_copy(update={"workers": 0})

        def frame_map(model: Any) -> float:
            score = BoxScorer(model, recipe.detector, recipe.model.patch_size)
            places, scores = [np.zeros(0, np.int64)], [np.zeros((0, recipe.detector.classes), np.float32)]
            shape = ViewShape(recipe.model.frames, validation.short_side)
            loader = make_frame_loader(test, mine, data, shape, batch=validation.batch, rank=ranks.data_rank)
            with loader:
                for frame in (frame for batch in loader for frame in score.frames(batch, test)):
                    places.append(np.arange(len(test.people))[test.on(frame.row)])
                    scores.append(frame.scores)
                    ranks.progress.tick()
            if len(mine) < math.ceil(len(test.key_frames) / ranks.world_size):
                self._dummy_forward(score, ranks)
            gathered = [
                gather_rows(torch.from_numpy(np.concatenate(part)).to(ranks.device), ranks).cpu().numpy()
                for part in (places, scores)
            ]
            whole = np.full((len(test.people), recipe.detector.classes), np.nan, np.float32)
            whole[gathered[0]] = gathered[1]
            return test.compute_map(test.found(whole)).mean

        return frame_map

    def _dummy_forward(self, score: BoxScorer, ranks: Ranks) -> None:
        """Run a forward pass whose result is not used: at ZeRO stage 3 all ranks must run the same number of passes."""
        side = self.recipe.model.input_size
        clip = torch.zeros(self.recipe.model.frames, side, side, 3, dtype=torch.uint8, device=ranks.device)
        score(clip, np.zeros((0, 4)))

    def _truth(self) -> Boxes:
        config = self.recipe.key_frames
        truth = read_ground_truth(config.annotations, self.recipe.detector.classes)
        return truth if config.excluded is None else truth.without(read_excluded(config.excluded))
