"""`mvd-scale predict` and `mvd_scale.load_classifier`: predictions of a fine-tuned classifier for single videos.

Legend: F frames of a video, H W pixels, V views, C classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvd_scale.checkpoints import Checkpoint, Hints, build_classifier, read_checkpoint
from mvd_scale.config.data import ViewsConfig
from mvd_scale.config.model import Positions
from mvd_scale.config.training import FrozenPrecision
from mvd_scale.data.loaders.single_video import views_of_file, views_of_frames
from mvd_scale.data.storage import DecodeError
from mvd_scale.distributed.process_group import choose_device
from mvd_scale.errors import UserError
from mvd_scale.evaluation.scorer import ClipScorer, views_from_checkpoint
from mvd_scale.models.precision import usual_precision

VideoInput = str | os.PathLike[str] | NDArray[np.uint8] | Tensor
"""A path or URL, or RGB frames: uint8 (F, H, W, 3)."""


class VideoClassifier:
    """Fine-tuned classifier that takes whole videos; `load_classifier` makes one."""

    def __init__(
        self, checkpoint: Checkpoint, views: ViewsConfig, device: torch.device, precision: FrozenPrecision
    ) -> None:
        self.score = ClipScorer(build_classifier(checkpoint), device, precision)
        self.model = checkpoint.model
        self.views = views
        self.device = device
        self.classes = checkpoint.class_names or tuple(map(str, range(checkpoint.classes or 0)))
        """Class names in the order of the scores; numbers as text if the weights contain no names."""

    def __call__(self, video: VideoInput) -> Tensor:
        """Score a video as `mvd-scale evaluate` does.

        Args:
            video: path or URL of a file, or RGB frames uint8 (F, H, W, 3) as an array or a tensor.

        Returns:
            the mean of the softmax scores of its views, float32 (C,), on the CPU.

        Raises:
            UserError: the file is missing or cannot be decoded, or the array is not uint8 (F, H, W, 3).
        """
        return self.score(self._cut(video)).mean(0).cpu()

    def top(self, video: VideoInput, count: int = 5) -> list[tuple[str, float]]:
        """Return the `count` most likely classes of a video with their probabilities, the likeliest first.

        Raises:
            UserError: see `__call__`.
        """
        values, places = self(video).topk(min(count, len(self.classes)))
        return [(self.classes[c], p) for c, p in zip(places.tolist(), values.tolist(), strict=True)]

    def _cut(self, video: VideoInput) -> Tensor:
        if isinstance(video, (str, os.PathLike)):
            try:
                return views_of_file(os.fspath(video), self.views, self.model, self.device)
            except DecodeError as error:
                raise UserError(f"{os.fspath(video)} cannot be decoded: {error.reason}") from error
        frames = video.detach().cpu().numpy() if isinstance(video, Tensor) else video
        if not isinstance(frames, np.ndarray):
            raise UserError(f"a {type(video).__name__} is not a video: expected a path, or uint8 frames (F, H, W, 3)")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise UserError(f"{frames.dtype} {frames.shape} is not a video: expected uint8 frames (F, H, W, 3) in RGB")
        return views_of_frames(frames, self.views, self.model, self.device)


def load_classifier(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: FrozenPrecision | None = None,
    sampling: Literal["dense", "uniform"] | None = None,
    stride: int | None = None,
    clips: int | None = None,
    crops: int | None = None,
    positions: Positions | None = None,
) -> VideoClassifier:
    """Read a fine-tuned classifier that can be called with videos.

    Args:
        path: file or folder in any format that `mvd-scale inspect` reads. Of a run folder the last weights are used;
            those of the best validation must be named: `RUN/best.safetensors`.
        device: `auto`, `cuda` or `cpu`.
        precision: precision of the classifier; by default fp16 on GPUs and fp32 on CPUs. `int8` is fastest on CPUs.
        sampling: choice of the frames of a clip. By default this and the following arguments are those stored with the
            weights, or those published for Kinetics-400.
        stride: distance between two frames of a dense clip, in frames of the video.
        clips: number of clips over time.
        crops: number of crops per clip.
        positions: position table of the training, for a file that does not hold it.

    Raises:
        UserError: the weights cannot be read or have no classification head, the device or its precision is not
            available, or the views are not valid.
    """
    place = choose_device(device)
    checkpoint = read_checkpoint(Path(path), Hints(positions=positions))
    changes = {"sampling": sampling, "stride": stride, "clips": clips, "crops": crops}
    views = views_from_checkpoint(checkpoint, {name: value for name, value in changes.items() if value is not None})
    return VideoClassifier(checkpoint, views, place, precision or usual_precision(place))


@dataclass(frozen=True)
class Prediction:
    """Prediction for one video, or the reason why there is none."""

    video: str
    top: list[tuple[str, float]]
    """Class names and probabilities, the likeliest first; empty after an error."""

    error: str | None = None

    def to_text(self) -> str:
        """Format as text: the video, then one line per class."""
        lines = [f"{100 * probability:6.2f} %  {name}" for name, probability in self.top]
        return "\n  ".join([self.video, *lines] if self.error is None else [self.video, f"error: {self.error}"])

    def to_json(self) -> str:
        """Format as one line of JSON."""
        if self.error is not None:
            return json.dumps({"video": self.video, "error": self.error})
        return json.dumps(
            {"video": self.video, "top": [{"class": name, "probability": value} for name, value in self.top]}
        )


def predict(classifier: VideoClassifier, videos: Sequence[str], count: int) -> Iterator[Prediction]:
    """Predict the `count` most likely classes of each video in turn; continues after a video that cannot be decoded.

    Raises:
        UserError: raised after the last video if some videos could not be decoded; the message names them.
    """
    failed = []
    for video in videos:
        try:
            yield Prediction(video, classifier.top(video, count))
        except UserError as error:
            failed.append(video)
            yield Prediction(video, [], str(error))
    if failed:
        raise UserError(f"{len(failed)} of {len(videos)} videos cannot be decoded: {', '.join(failed)}")
