"""Evaluation of a detector: the boxes and key frames that are scored, the scoring, and the frame mAP of the scores.

Whole frames are used, resized by their short side. The model gets one clip at a time, because frames differ in size;
therefore scores depend neither on the batch size nor on the number of ranks. Their last digits depend on the number of
threads of a rank, because threads divide sums: runs with equal OMP_NUM_THREADS give equal bits.

Legend: P people of a key frame, X people of all key frames, C actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvd_scale.config import DataConfig, DetectorConfig
from mvd_scale.config.detection import DetectionTest
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.loaders.view_loader import ViewShape
from mvd_scale.data.manifest import Manifest
from mvd_scale.detection.annotations import read_actions, read_excluded, read_ground_truth, read_person_boxes
from mvd_scale.detection.boxes import Boxes, KeyFrame
from mvd_scale.detection.key_frames import KeyFrames, find_key_frames
from mvd_scale.detection.metrics import FrameMap, compute_frame_map
from mvd_scale.detection.people import widen_boxes
from mvd_scale.detection.whole_frames import FrameBatch, WholeFrameLoader
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.models.detector import AVA_MEAN

PADDING_COLOR = tuple(round(255 * level) for level in AVA_MEAN)
"""Colour of the padding up to a multiple of the patch size: about 0 after normalisation."""


@dataclass(frozen=True)
class DetectionTestData:
    """Data of an evaluation: ground truth, and the boxes of people that are scored."""

    truth: Boxes
    people: Boxes
    """Boxes ordered by key frame; a score is the confidence of the person detector."""

    key_frames: KeyFrames
    actions: dict[int, str]
    excluded: frozenset[KeyFrame]

    @classmethod
    def open(cls, test: DetectionTest, videos: Manifest, classes: int, key: str) -> DetectionTestData:
        """Read the files of an evaluation.

        Args:
            test: paths of the files, and settings.
            videos: manifest of the videos.
            classes: number of actions; they are numbered from 1 to it.
            key: key of the recipe, for messages.

        Raises:
            UserError: a file is invalid, or the files do not fit each other.
        """
        excluded = frozenset() if test.excluded is None else read_excluded(test.excluded)
        truth = read_ground_truth(test.annotations, classes).without(excluded)
        people = read_person_boxes(test.boxes, test.score).without(excluded)
        people = people.take(np.argsort(people.frame, kind="stable"))
        key_frames = find_key_frames(people, videos, test.starts_at, key)
        return cls(truth, people, key_frames, read_actions(test.actions, classes), excluded)

    def on(self, row: int) -> slice:
        """Return the slice of `people` on a key frame, given by its row in `key_frames`."""
        number = self.key_frames.numbers[row]
        first, end = np.searchsorted(self.people.frame, [number, number + 1]).tolist()
        return slice(first, end)

    def found(self, scores: NDArray[np.float32]) -> Boxes:
        """Convert scores to detections: one box per person and listed action.

        The score of a detection is the action's score times the person's score, as published (VideoMAE).

        Args:
            scores: (X, C); nan for people that could not be scored, which give no detection.
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

    def compute_map(self, found: Boxes, per_frame: int | None = None) -> FrameMap:
        """Compute the frame mAP; ground truth on key frames that were not scored counts as missed."""
        return compute_frame_map(self.truth, found, self.actions, self.excluded, per_frame=per_frame)


class ScoredKeyFrame(NamedTuple):
    """Scores of one key frame."""

    row: int
    """Row of the key frame in `DetectionTestData.key_frames`."""

    decoded: bool
    scores: NDArray[np.float32]
    """Scores of its people, (P, C); nan if the video could not be decoded."""


class BoxScorer:
    """Callable that scores people on whole frames with a detector, which may be frozen or in training."""

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], config: DetectorConfig, patch: int) -> None:
        self.model = model
        self.config = config
        self.patch = patch

    @torch.no_grad()
    def __call__(self, clip: Tensor, corners: NDArray[np.float64]) -> Tensor:
        """Score the people on a key frame.

        Args:
            clip: uint8 (T, H, W, 3).
            corners: boxes as fractions of the frame, (P, 4).

        Returns:
            float32 (P, C), after the sigmoid.
        """
        height, width = clip.shape[1:3]
        boxes = widen_boxes(corners * [width, height, width, height], self.config.widen, (height, width))
        rows = np.column_stack([np.zeros(len(boxes)), boxes]).astype(np.float32)
        # Not compiled: frames differ in size, and torch.compile would compile a program for each size.
        with torch.compiler.set_stance("force_eager"):
            scores = self.model(pad_to_patches(clip, self.patch).unsqueeze(0), torch.from_numpy(rows).to(clip.device))
        return scores.float().sigmoid()

    def frames(self, batch: FrameBatch, test: DetectionTestData) -> Iterator[ScoredKeyFrame]:
        """Score every key frame of a batch."""
        for clip, row, decoded in zip(batch.pixels, batch.rows, batch.decoded, strict=True):
            corners = test.people.corners[test.on(row)]
            # Clips that were not decoded are passed too: at ZeRO stage 3 all ranks must run the same number of passes.
            scores = self(clip, corners).cpu().numpy()
            yield ScoredKeyFrame(row, decoded, scores if decoded else np.full_like(scores, np.nan))


def pad_to_patches(clip: Tensor, patch: int) -> Tensor:
    """Pad a clip with grey on the right and at the bottom to multiples of the patch size: uint8 (T, H, W, 3)."""
    frames, height, width, _ = clip.shape
    rows, columns = -(-height // patch) * patch, -(-width // patch) * patch
    if (rows, columns) == (height, width):
        return clip
    filled = clip.new_tensor(PADDING_COLOR).expand(frames, rows, columns, 3).clone()
    filled[:, :height, :width] = clip
    return filled


def make_frame_loader(
    test: DetectionTestData,
    rows: NDArray[np.int64],
    data: DataConfig,
    shape: ViewShape,
    *,
    batch: int,
    rank: DataRank,
    quarantine: Quarantine | None = None,
) -> WholeFrameLoader:
    """Create the loader of the clips around the key frames `rows` of an evaluation; see `WholeFrameLoader`."""
    return WholeFrameLoader(test.key_frames, rows, data, shape=shape, batch=batch, rank=rank, quarantine=quarantine)
