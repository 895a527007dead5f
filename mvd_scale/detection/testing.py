"""The test of a detector: which boxes on which key frames are scored, how, and what the scores are worth.

A frame is seen whole, its short side resized. One clip goes through the model at a time: frames differ in size, and
so scores depend neither on batches nor on ranks.

Legend: P people of a key frame, X people of all key frames, C actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvd_scale.config import DataConfig, DetectorConfig
from mvd_scale.config.detection import DetectionTest
from mvd_scale.data.augment import IMAGENET_MEAN
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.view_loader import ViewShape
from mvd_scale.detection.annotations import read_actions, read_excluded, read_ground_truth, read_people
from mvd_scale.detection.boxes import Boxes, KeyFrame
from mvd_scale.detection.key_frames import KeyFrames, find_key_frames
from mvd_scale.detection.metrics import FrameScore, frame_score
from mvd_scale.detection.people import widen_boxes
from mvd_scale.detection.whole_frames import FrameBatch, WholeFrameLoader
from mvd_scale.distributed.data_rank import DataRank

GREY = tuple(round(255 * level) for level in IMAGENET_MEAN)
"""What fills up a frame to whole patches: 0 after normalisation."""


@dataclass(frozen=True)
class KeyFrameTest:
    """Ground truth, and the boxes of people that are scored."""

    truth: Boxes
    people: Boxes
    """In the order of their key frames; a score says how sure the detector of people is."""

    key_frames: KeyFrames
    actions: dict[int, str]
    excluded: frozenset[KeyFrame]

    @classmethod
    def open(cls, test: DetectionTest, videos: Manifest, classes: int, key: str) -> KeyFrameTest:
        """Read the files of a test.

        Args:
            test: names them.
            videos: of the test.
            classes: actions are numbered from 1 to this.
            key: of the recipe, for messages.

        Raises:
            UserError: a file is not as it should be, or they do not go together.
        """
        excluded = frozenset() if test.excluded is None else read_excluded(test.excluded)
        truth = read_ground_truth(test.annotations, classes).without(excluded)
        people = read_people(test.boxes, test.score).without(excluded)
        people = people.take(np.argsort(people.frame, kind="stable"))
        key_frames = find_key_frames(people, videos, test.starts_at, key)
        return cls(truth, people, key_frames, read_actions(test.actions, classes), excluded)

    def on(self, row: int) -> slice:
        """People on one of the key frames."""
        number = self.key_frames.numbers[row]
        first, end = np.searchsorted(self.people.frame, [number, number + 1]).tolist()
        return slice(first, end)

    def found(self, scores: NDArray[np.float32]) -> Boxes:
        """What the model says of every person, one box for each listed action.

        The score is that of the action times that of the person, as published (VideoMAE).

        Args:
            scores: (X, C); nan where a person could not be scored.
        """
        scored = np.flatnonzero(np.isfinite(scores).all(axis=1))
        numbers = np.array(list(self.actions), dtype=np.int64)
        product = scores[scored][:, numbers - 1].astype(np.float64) * self.people.scores[scored, None]
        each = np.repeat(scored, len(numbers))
        return Boxes(
            self.people.frames,
            self.people.frame[each],
            self.people.corners[each],
            np.tile(numbers, len(scored)),
            product.ravel(),
        )

    def judge(self, found: Boxes, per_frame: int | None = None) -> FrameScore:
        """Frame mAP; ground truth of which no person was scored counts as not found."""
        return frame_score(self.truth, found, self.actions, self.excluded, per_frame=per_frame)


class Scored(NamedTuple):
    """One key frame of a test."""

    row: int
    """Which of the key frames."""

    decoded: bool
    scores: NDArray[np.float32]
    """Of its people, (P, C); nan if the video could not be decoded."""


class Scorer:
    """A frozen detector, or one in training, on whole frames."""

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], config: DetectorConfig, patch: int) -> None:
        self.model = model
        self.config = config
        self.patch = patch

    @torch.no_grad()
    def __call__(self, clip: Tensor, corners: NDArray[np.float64]) -> Tensor:
        """Scores of the people of a key frame.

        Args:
            clip: uint8 (T, H, W, 3).
            corners: shares of the frame, (P, 4).

        Returns:
            float32 (P, C), after the sigmoid.
        """
        height, width = clip.shape[1:3]
        boxes = widen_boxes(corners * [width, height, width, height], self.config.widen, (height, width))
        rows = np.column_stack([np.zeros(len(boxes)), boxes]).astype(np.float32)
        # Frames differ in size, and each size would be a program of its own.
        with torch.compiler.set_stance("force_eager"):
            scores = self.model(to_patches(clip, self.patch).unsqueeze(0), torch.from_numpy(rows).to(clip.device))
        return scores.float().sigmoid()

    def frames(self, batch: FrameBatch, test: KeyFrameTest) -> Iterator[Scored]:
        """Every key frame of a batch."""
        for clip, row, decoded in zip(batch.pixels, batch.rows, batch.decoded, strict=True):
            corners = test.people.corners[test.on(row)]
            # Undecoded ones go through too: at ZeRO stage 3 the ranks compute together.
            scores = self(clip, corners).cpu().numpy()
            yield Scored(row, decoded, scores if decoded else np.full_like(scores, np.nan))


def to_patches(clip: Tensor, patch: int) -> Tensor:
    """A clip with grey to the right and below, up to whole patches: uint8 (T, H, W, 3)."""
    frames, height, width, _ = clip.shape
    rows, columns = -(-height // patch) * patch, -(-width // patch) * patch
    if (rows, columns) == (height, width):
        return clip
    filled = clip.new_tensor(GREY).expand(frames, rows, columns, 3).clone()
    filled[:, :height, :width] = clip
    return filled


def load_frames(
    test: KeyFrameTest,
    rows: NDArray[np.int64],
    data: DataConfig,
    shape: ViewShape,
    *,
    batch: int,
    rank: DataRank,
    report: Path | None = None,
) -> WholeFrameLoader:
    """The clips of some key frames; arguments as of `WholeFrameLoader`."""
    return WholeFrameLoader(test.key_frames, rows, data, shape=shape, batch=batch, rank=rank, report=report)
