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

from mvd_scale.config.data import CenterCrop, CornerCrop, DataConfig, MaskConfig, RandomResizedCrop, ShortSideCrop
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.augment import Augmentation, draw_augmentation
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

_ORDER, _CLIP, _ROUND, _BOXES = 1, 2, 3, 4
"""First words of the keys, so that the order of an epoch and its clips never share random numbers."""


@dataclass(frozen=True)
class CopyPlan:
    """All that is random about one copy of a clip, decided."""

    crop: Box
    """Within the frame as shown."""

    flip: bool
    """Mirror left and right."""

    augment: Augmentation
    """What is done to the resized crop."""

    visible: NDArray[np.int64]
    """Token indices, ascending, time-major: int64 (V,)."""

    masked: NDArray[np.int64]
    """The other tokens, likewise: int64 (M,)."""


@dataclass(frozen=True)
class ClipPlan:
    """All that is random about one decoded clip, decided."""

    row: int
    """Row of the manifest."""

    frames: NDArray[np.int64]
    """Frame numbers in display order, ascending, some possibly equal: int64 (T,)."""

    copies: tuple[CopyPlan, ...]
    """What becomes of the frames, `data.copies` times."""


class Sampler:
    """Plans of the clips of a manifest. Picklable; holds a few numbers per usable video.

    An epoch has `clips` clips (`steps_per_epoch` counts the same): every usable video `clips_per_video` times; of a
    mixture, every set as often as its weight says.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, seed: int) -> None:
        self.rows = manifest.usable
        self.frames = manifest.frames[self.rows]
        self.sizes = np.stack([manifest.height[self.rows], manifest.width[self.rows]], axis=1)
        self.dataset = manifest.dataset[self.rows]
        self.parts = mixture_parts(manifest, data)
        self.data = data
        self.model = model
        self.seed = seed

    @property
    def clips(self) -> int:
        """Clips of one epoch."""
        return sum(part.clips for part in self.parts)

    def plan(self, epoch: int, i: int, attempt: int = 0) -> ClipPlan:
        """Clip `i` of an epoch.

        Args:
            epoch: counted from 0.
            i: 0 <= i < clips.
            attempt: 0 for the clip itself; n for its n-th substitute, another draw from another video at random,
                needed where a video turns out not to be decodable.
        """
        rng = _generator(_CLIP, self.seed, epoch, i, attempt)
        video = int(rng.integers(len(self.rows))) if attempt else draw_video(self.seed, epoch, i, self.parts)
        height, width = self.sizes[video].tolist()
        data, model = self.data, self.model
        frames = self.draw_frames(rng, video)
        copies = []
        for copy in range(data.copies):
            rng = _generator(_CLIP, self.seed, epoch, i, attempt, copy) if copy else rng
            crop = draw_crop(rng, data.crop, height, width, model.input_size)
            flip = bool(rng.random() < data.flip)
            visible, masked = draw_mask(rng, data.mask, model.grid)
            augment = draw_augmentation(rng, data.augment, model.frames, model.input_size)
            copies.append(CopyPlan(crop, flip, augment, visible, masked))
        return ClipPlan(int(self.rows[video]), frames, tuple(copies))

    def draw_frames(self, rng: Generator, video: int) -> NDArray[np.int64]:
        """Frame numbers of a clip of a usable video: int64 (T,), ascending."""
        stride = self.parts[self.dataset[video]].stride
        return draw_frames(rng, self.data.sampling, int(self.frames[video]), self.model.frames, stride)


@dataclass(frozen=True)
class Part:
    """One set of videos of a mixture; a manifest without mixture is one part."""

    first: int
    """Its first video, counted over the usable ones."""

    videos: int

    clips: int
    """Clips of it in one epoch."""

    stride: int


def mixture_parts(manifest: Manifest, data: DataConfig) -> tuple[Part, ...]:
    """How many clips of each set of a mixture an epoch has."""
    counts = np.bincount(manifest.dataset[manifest.usable], minlength=len(data.mixture or [0])).tolist()
    shares = [(source.weight, source.stride) for source in (data.mixture or {}).values()] or [(1.0, None)]
    parts, first = [], 0
    for videos, (weight, stride) in zip(counts, shares, strict=True):
        clips = max(round(weight * data.clips_per_video * videos), 1) if videos else 0
        parts.append(Part(first, videos, clips, stride or data.stride))
        first += videos
    return tuple(parts)


def draw_video(seed: int, epoch: int, i: int, parts: tuple[Part, ...]) -> int:
    """Which usable video clip `i` of an epoch shows.

    A permutation of the epoch says which clip of which part it is. A part whose epochs are not whole rounds through
    its videos goes on in the next epoch where it stopped, in the order of an endless row of permutations: so every
    video comes up equally often.
    """
    clip = int(epoch_order(seed, epoch, sum(part.clips for part in parts))[i])
    for number, part in enumerate(parts):
        if clip < part.clips:
            round_, place = divmod(epoch * part.clips + clip, part.videos)
            if part.clips % part.videos == 0:
                return part.first + place
            return part.first + int(round_order(seed, round_, number, part.videos)[place])
        clip -= part.clips
    raise IndexError(i)


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
    drawn = data.copies * sum(part.clips for part in mixture_parts(manifest, data))
    steps = drawn // global_batch
    if not steps:
        raise UserError(
            f"an epoch of {videos} videos has {drawn} clips (data.clips_per_video {data.clips_per_video}, data.copies "
            f"{data.copies}), fewer than training.global_batch {global_batch}: it needs at least one global batch. Set "
            f"data.clips_per_video to {-(-global_batch * data.clips_per_video // drawn)} or more, or lower "
            "training.global_batch"
        )
    return steps


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, clips: int) -> NDArray[np.int64]:
    """Order of an epoch: a permutation of its clips, int64 (clips,)."""
    return _generator(_ORDER, seed, epoch).permutation(clips)


@lru_cache(maxsize=8)
def round_order(seed: int, round_: int, part: int, videos: int) -> NDArray[np.int64]:
    """Order of one round through the videos of a part: a permutation, int64 (videos,)."""
    return _generator(_ROUND, seed, round_, part).permutation(videos)


def draw_frames(rng: Generator, rule: str, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Frame numbers of a clip by one of the rules of `data.sampling`: int64 (frames,), ascending."""
    if rule == "dense":
        return dense_frames(rng, available, frames, stride)
    if rule == "window":
        return window_frames(rng, available, frames, stride)
    return segment_frames(rng, available, frames)


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


def window_frames(rng: Generator, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Frame numbers of a clip spread evenly over a window of frames x stride, at random in the video.

    The published fine-tuning rule for Kinetics, UCF101 and HMDB51. A video that is no longer than the window is
    spread out whole, one frame for every `stride` of it, and its last frame is repeated.

    Returns:
        int64 (frames,), ascending, within 0 .. available - 1.
    """
    window = frames * stride
    if available > window:
        end = int(rng.integers(window, available))
        places = np.linspace(end - window, end, num=frames)
        return np.clip(places, end - window, end - 1).astype(np.int64)
    whole = min(available // stride, frames)
    places = np.concatenate([np.linspace(0, available, num=whole), np.full(frames - whole, float(available))])
    return np.clip(places, 0, available - 1).astype(np.int64)


def segment_frames(rng: Generator, available: int, frames: int) -> NDArray[np.int64]:
    """A random frame of each of `frames` equal parts of the video (TSN; published for Something-Something V2).

    What the division leaves at the end is never drawn; a video of fewer frames than parts gives its first frame only,
    both as published.

    Returns:
        int64 (frames,), ascending, within 0 .. available - 1.
    """
    length = available // frames
    if not length:
        return np.zeros(frames, dtype=np.int64)
    return np.arange(frames, dtype=np.int64) * length + rng.integers(length, size=frames)


def draw_crop(
    rng: Generator,
    crop: CornerCrop | RandomResizedCrop | ShortSideCrop | CenterCrop,
    height: int,
    width: int,
    input_size: int,
) -> Box:
    """A box in a frame of height x width, to be resized to input_size x input_size."""
    if isinstance(crop, CornerCrop):
        return corner_crop(rng, crop.scales, height, width, input_size)
    if isinstance(crop, RandomResizedCrop):
        return random_resized_crop(rng, crop.area, crop.aspect, height, width)
    if isinstance(crop, ShortSideCrop):
        return short_side_crop(rng, crop.sides, height, width, input_size)
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


def short_side_crop(rng: Generator, sides: tuple[int, int], height: int, width: int, input_size: int) -> Box:
    """What a random square of `input_size` shows of a frame whose short side is resized to one of `sides`.

    Side and place are drawn uniformly. The box is whole pixels of the frame before it is resized.
    """
    short = min(height, width)
    side = min(round(input_size * short / int(rng.integers(sides[0], sides[1] + 1))), short)
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side, side


def draw_mask(
    rng: Generator, mask: MaskConfig | None, grid: tuple[int, int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Visible and masked tokens of a grid (time, height, width), in the same number for every draw.

    A tube mask hides int(ratio x height x width) patches, the same ones in every time slice (VideoMAE, Sec. 3.2);
    a random mask hides int(ratio x N) tokens. Of the masked tokens, only those to be decoded are listed.

    Returns:
        visible int64 (V,), masked int64 (M,): ascending, time-major.
    """
    slices, height, width = grid
    if mask is None:
        return np.arange(slices * height * width, dtype=np.int64), np.empty(0, dtype=np.int64)
    if mask.kind == "random":
        order = rng.permutation(slices * height * width)
        hidden = int(mask.ratio * len(order))
        return np.sort(order[hidden:]), np.sort(order[:hidden])
    order = rng.permutation(height * width)
    hidden = int(mask.ratio * len(order))
    starts = np.arange(slices, dtype=np.int64)[:, None] * len(order)
    visible, masked = (starts + np.sort(order[hidden:])).ravel(), (starts + np.sort(order[:hidden])).ravel()
    return visible, masked if mask.decode == 1 else masked[running_cells(rng, mask.decode, grid)[masked]]


def running_cells(rng: Generator, share: float, grid: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Tokens that are decoded (VideoMAE V2, "dual masking"): 4 x share patches of every cell of 2 x 2.

    The choice moves on by one patch of the cell with every time slice, so that four slices take every patch equally
    often. Where it starts is random.

    Returns:
        bool (N,), time-major.
    """
    slices, height, width = grid
    place = np.arange(height)[:, None] % 2 * 2 + np.arange(width) % 2
    turn = np.arange(slices)[:, None, None] + int(rng.integers(4))
    taken: NDArray[np.bool_] = (place + turn) % 4 < round(4 * share)
    return taken.ravel()


def random_of_boxes(seed: int, epoch: int, i: int, attempt: int) -> Generator:
    """Random numbers for the boxes of a clip; the same arguments as of `Sampler.plan`."""
    return _generator(_BOXES, seed, epoch, i, attempt)


def _generator(*key: int) -> Generator:
    return Generator(Philox(SeedSequence(key)))
