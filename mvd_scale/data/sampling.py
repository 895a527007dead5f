"""What a step needs: pure functions from a place in the stream of clips to frames, crop, flip and mask.

The stream is endless and global: clip p of it is clip i of some epoch, and everything about that clip is keyed by
(seed, epoch, i). Ranks, workers and restarts decide only who prepares it.

Legend: T frames, N tokens, V visible, M masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray

from mvd_scale.config.data import CenterCrop, CornerCrop, DataConfig, MaskConfig, RandomResizedCrop
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

_ORDER, _CLIP = 1, 2
"""First words of the keys, so that the order of an epoch and its clips never share random numbers."""


@dataclass(frozen=True)
class ClipPlan:
    """All that is random about one clip, decided."""

    row: int
    """Row of the manifest."""

    frames: NDArray[np.int64]
    """Frame numbers in display order, ascending, the last ones possibly equal: int64 (T,)."""

    crop: Box
    """Within the frame as coded."""

    flip: bool
    """Mirror left and right."""

    visible: NDArray[np.int64]
    """Token indices, ascending, time-major: int64 (V,)."""

    masked: NDArray[np.int64]
    """The other tokens, likewise: int64 (M,)."""


class Sampler:
    """Plans of the clips of a manifest. Picklable; holds three numbers per usable video.

    An epoch has `clips` = usable videos x `clips_per_video` clips; it visits every video `clips_per_video` times.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, seed: int) -> None:
        self.rows = manifest.usable
        self.frames = manifest.frames[self.rows]
        self.sizes = np.stack([manifest.height[self.rows], manifest.width[self.rows]], axis=1)
        self.data = data
        self.model = model
        self.seed = seed

    @property
    def clips(self) -> int:
        """Clips of one epoch."""
        return len(self.rows) * self.data.clips_per_video

    def plan(self, epoch: int, i: int, attempt: int = 0) -> ClipPlan:
        """Clip `i` of an epoch.

        Args:
            epoch: counted from 0.
            i: 0 <= i < clips.
            attempt: 0 for the clip itself; n for its n-th substitute, another draw from another video at random,
                needed where a video turns out not to be decodable.
        """
        rng = _generator(_CLIP, self.seed, epoch, i, attempt)
        if attempt:
            video = int(rng.integers(len(self.rows)))
        else:
            video = int(epoch_order(self.seed, epoch, self.clips)[i]) % len(self.rows)
        height, width = self.sizes[video].tolist()
        frames = dense_frames(rng, int(self.frames[video]), self.model.frames, self.data.stride)
        crop = draw_crop(rng, self.data.crop, height, width, self.model.input_size)
        flip = bool(rng.random() < self.data.flip)
        visible, masked = draw_mask(rng, self.data.mask, self.model.grid)
        return ClipPlan(int(self.rows[video]), frames, crop, flip, visible, masked)


@dataclass(frozen=True)
class Share:
    """Which places of the stream one rank prepares, in its order.

    A global batch is cut into contiguous slices by rank, a slice into micro batches. What is left of an epoch's
    clips after the last whole global batch is dropped; another order drops others.
    """

    clips: int
    """Clips of an epoch, as of the sampler."""

    global_batch: int
    rank: int
    world_size: int

    @property
    def clips_per_step(self) -> int:
        """Clips of one step on this rank."""
        return self.global_batch // self.world_size

    def position(self, n: int) -> int:
        """Place in the stream of this rank's n-th clip, counted from the start of training."""
        step, offset = divmod(n, self.clips_per_step)
        return step * self.global_batch + self.rank * self.clips_per_step + offset

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch of a place in the stream, and number of the clip in it."""
        return divmod(position, self.clips // self.global_batch * self.global_batch)


def steps_per_epoch(manifest: Manifest, data: DataConfig, global_batch: int) -> int:
    """Optimizer steps of one epoch: whole global batches, the remainder dropped.

    Raises:
        UserError: an epoch has fewer clips than one global batch.
    """
    videos = len(manifest.usable)
    steps = videos * data.clips_per_video // global_batch
    if not steps:
        raise UserError(
            f"{videos} videos x data.clips_per_video {data.clips_per_video} are fewer clips than "
            f"training.global_batch {global_batch}: an epoch needs at least one global batch. Set "
            f"data.clips_per_video to {-(-global_batch // videos)} or more, or lower training.global_batch"
        )
    return steps


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, clips: int) -> NDArray[np.int64]:
    """Order of an epoch: a permutation of its clips, int64 (clips,). Clip c shows video c modulo the videos."""
    return _generator(_ORDER, seed, epoch).permutation(clips)


def dense_frames(rng: Generator, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Frame numbers of a clip: `frames` of them, `stride` apart, from a random start.

    The published pre-training rule (MVD, VideoMAE): the start is uniform over the places where frames x stride
    frames fit, else 0; one steps on as long as the last frame of the video stays ahead, then repeats the frame
    reached.

    Returns:
        int64 (frames,), ascending, within 0 .. available - 1.
    """
    start = int(rng.integers(max(available - frames * stride + 1, 1)))
    steps = max((available - 2 - start) // stride, 0)
    return start + stride * np.minimum(np.arange(frames, dtype=np.int64), steps)


def draw_crop(
    rng: Generator, crop: CornerCrop | RandomResizedCrop | CenterCrop, height: int, width: int, input_size: int
) -> Box:
    """A box in a frame of height x width, to be resized to input_size x input_size."""
    if isinstance(crop, CornerCrop):
        return corner_crop(rng, crop.scales, height, width, input_size)
    if isinstance(crop, RandomResizedCrop):
        return random_resized_crop(rng, crop.area, crop.aspect, height, width)
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def corner_crop(rng: Generator, scales: tuple[float, ...], height: int, width: int, input_size: int) -> Box:
    """Multi-scale corner crop (TSN), as VideoMAE and MVD pre-train with it.

    Height and width are the short side times one of `scales` each, at most one entry of the list apart; a side less
    than 3 pixels off the input size becomes the input size (here never beyond the frame; the published code then
    pads). The box stands at one of 13 places: all of a grid of quarters whose row and column are both even or both
    odd. Pairs and places are drawn uniformly.
    """
    short = min(height, width)
    sides = [int(short * scale) for scale in scales]
    sides = [min(input_size, short) if abs(side - input_size) < 3 else side for side in sides]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[int(rng.integers(len(pairs)))]
    places = [(row, column) for row in range(5) for column in range(5) if (row - column) % 2 == 0]
    row, column = places[int(rng.integers(len(places)))]
    return row * ((height - crop_height) // 4), column * ((width - crop_width) // 4), crop_height, crop_width


def random_resized_crop(
    rng: Generator, area: tuple[float, float], aspect: tuple[float, float], height: int, width: int
) -> Box:
    """A box of random area and log-uniform aspect (width over height), torchvision's rule, as MAE uses it.

    Ten draws that do not fit end in the largest centred box of an allowed aspect.
    """
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        ratio = float(np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1]))))
        crop_height, crop_width = round((pixels / ratio) ** 0.5), round((pixels * ratio) ** 0.5)
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    ratio = min(max(width / height, aspect[0]), aspect[1])
    crop_height = min(height, round(width / ratio))
    crop_width = min(width, round(height * ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def draw_mask(
    rng: Generator, mask: MaskConfig, grid: tuple[int, int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Visible and masked tokens of a grid (time, height, width), in the same number for every draw.

    A tube mask hides int(ratio x height x width) patches, the same ones in every time slice (VideoMAE, Sec. 3.2);
    a random mask hides int(ratio x N) tokens.

    Returns:
        visible int64 (V,), masked int64 (M,): ascending, time-major.
    """
    slices, height, width = grid
    if mask.kind == "random":
        order = rng.permutation(slices * height * width)
        hidden = int(mask.ratio * len(order))
        return np.sort(order[hidden:]), np.sort(order[:hidden])
    order = rng.permutation(height * width)
    hidden = int(mask.ratio * len(order))
    starts = np.arange(slices, dtype=np.int64)[:, None] * len(order)
    return (starts + np.sort(order[hidden:])).ravel(), (starts + np.sort(order[:hidden])).ravel()


def _generator(*key: int) -> Generator:
    return Generator(Philox(SeedSequence(key)))
