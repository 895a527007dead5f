"""Loader of training clips around key frames, with the boxes of the people in them.

Legend: B clips, P people of all clips, C actions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from mvd_scale.config import DataConfig, DetectionRecipe, ModelConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.columns import share
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.loaders.quarantine import Failure, Quarantine
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.sampler import Sampler, box_generator
from mvd_scale.detection.key_frames import KeyFrames, frames_around
from mvd_scale.detection.people import PersonBoxes, has_area, jitter_boxes, transform_boxes
from mvd_scale.distributed.data_rank import DataRank


@dataclass(frozen=True, kw_only=True)
class DetectionBatch(ClipBatch):
    """One micro batch of clips around key frames, on the training device."""

    boxes: Tensor
    """Index of the clip in the batch, then x1, y1, x2, y2 in its pixels: float32 (P, 5)."""

    actions: Tensor
    """1 for the actions that a person performs, else 0: float32 (P, C)."""


class KeyFrameSampler(Sampler):
    """Sampler of clips around key frames."""

    def __init__(self, key_frames: KeyFrames, data: DataConfig, model: ModelConfig, seed: int) -> None:
        super().__init__(key_frames.manifest, data, model, seed)
        self._centres = share(centres=key_frames.centres)

    def draw_frames(self, rng: Generator, video: int) -> NDArray[np.int64]:
        """Return the frame numbers around a key frame, int64 (T,); they do not depend on `rng`."""
        available = int(self.manifest.frames[self.rows[video]])
        centre = int(self._centres["centres"][video])
        return frames_around(centre, available, frames=self.model.frames, stride=self.data.stride)


class KeyFrameLoader(ClipLoader):
    """Iterator over micro batches of clips around key frames; deterministic for a seed, like `ClipLoader`.

    People whose boxes are outside of the crop are left out.

    Args:
        key_frames: key frames; each gives one clip, `data.clips_per_video` times per epoch.
        people: people on these key frames.
        jitter: largest shifts of the boxes' sides, see `TrainingKeyFrames.jitter`.
        data: settings of sampling, cropping and decoding.
        model: shape of the clips.
        seed: seed of all random choices.
        others: further arguments of `ClipLoader`.
    """

    def __init__(
        self,
        key_frames: KeyFrames,
        people: PersonBoxes,
        jitter: tuple[float, float, float, float],
        data: DataConfig,
        model: ModelConfig,
        seed: int,
        **others: Any,
    ) -> None:
        self._key_frames = key_frames
        self._people = people
        self._jitter = jitter
        self._attempts: list[int] = []
        super().__init__(key_frames.manifest, data, model, seed, **others)

    @classmethod
    def for_training(
        cls,
        key_frames: KeyFrames,
        people: PersonBoxes,
        recipe: DetectionRecipe,
        rank: DataRank,
        steps: range,
        *,
        quarantine: Quarantine | None = None,
    ) -> KeyFrameLoader:
        """Create the loader of a run that trains a detector; see `ClipLoader.for_run`.

        Args:
            key_frames: see `KeyFrameLoader`.
            people: see `KeyFrameLoader`.
            recipe: recipe of the run, with the settings of sampling, batches and jitter.
            rank: see `ClipLoader`.
            steps: optimizer steps to load, from the first one that is not completed to the last.
            quarantine: see `ClipLoader`.

        Raises:
            UserError: see `ClipLoader.for_run`.
        """
        plan, jitter = BatchPlan.for_run(recipe, rank.world_size, steps), recipe.key_frames.jitter
        return cls(
            key_frames,
            people,
            jitter,
            recipe.data,
            recipe.model,
            recipe.seed,
            plan=plan,
            rank=rank,
            quarantine=quarantine,
        )

    def _make_sampler(self, manifest: Manifest, data: DataConfig, model: ModelConfig, seed: int) -> Sampler:
        return KeyFrameSampler(replace(self._key_frames, manifest=manifest), data, model, seed)

    def _count_failures(self, rows: list[int], failures: list[list[Failure]]) -> None:
        super()._count_failures(rows, failures)
        self._attempts = [len(failed) for failed in failures]

    def _video(self, row: int) -> str:
        return self._manifest.name[row]

    def __next__(self) -> DetectionBatch:
        first = self._next
        batch = super().__next__()
        boxes, actions = [], []
        for k, attempt in enumerate(self._attempts):
            boxes_per_copy, clip_actions = self._people_of(self._shard.position(first + k), attempt)
            for copy, corners in enumerate(boxes_per_copy):
                inside = has_area(corners)
                clip = np.full((int(inside.sum()), 1), k * len(boxes_per_copy) + copy)
                boxes.append(np.column_stack([clip, corners[inside]]))
                actions.append(clip_actions[inside])
        return DetectionBatch(
            **{field.name: getattr(batch, field.name) for field in fields(batch)},
            boxes=self._on_device(np.concatenate(boxes)),
            actions=self._on_device(np.concatenate(actions)),
        )

    def _people_of(self, position: int, attempt: int) -> tuple[list[NDArray[np.float64]], NDArray[np.bool_]]:
        """Return the boxes (P, 4) in each copy of the clip at a position of the stream, and their actions (P, C).

        The plan of the clip (crop and flip) is computed again here: it is a pure function of the position, and this is
        cheaper than sending the plan from the worker.
        """
        epoch, i = self._shard.locate(position)
        plan = self._sampler.plan(epoch, i, attempt)
        people = self._people.on(int(self._key_frames.numbers[plan.row]))
        corners, side = self._people.corners[people], self._model.input_size
        placed = [transform_boxes(corners, copy, side) for copy in plan.copies]
        rng = box_generator(self._sampler.seed, epoch, i, attempt)
        return [jitter_boxes(rng, boxes, self._jitter, side) for boxes in placed], self._people.actions[people]

    def _on_device(self, rows: NDArray[Any]) -> Tensor:
        return torch.from_numpy(rows.astype(np.float32)).to(self._device, non_blocking=True)
