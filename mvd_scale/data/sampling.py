"""Sampling: pure functions from a position in the stream of clips to frames, crop, flip, augmentation and mask.

The stream is endless and the same for all ranks: position p is clip i of some epoch, and all random choices for that
clip are a function of (seed, epoch, i). The numbers of ranks and workers, and restarts, only decide who prepares it.

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
"""First entries of random generator keys, so that different uses never share random numbers."""


@dataclass(frozen=True)
class CopyPlan:
    """All random choices for one copy of a clip."""

    crop: Box
    """Box of the crop in the displayed frame, in pixels."""

    flip: bool
    """Whether to flip the clip left to right."""

    augment: Augmentation
    """Augmentation of the resized crop."""

    visible: NDArray[np.int64]
    """Indices of the visible tokens, ascending, time-major: int64 (V,)."""

    masked: NDArray[np.int64]
    """Indices of the masked tokens to predict, ascending, time-major: int64 (M,)."""


@dataclass(frozen=True)
class ClipPlan:
    """All random choices for one decoded clip and its copies."""

    row: int
    """Row of the video in the manifest."""

    frames: NDArray[np.int64]
    """Frame numbers in display order, ascending, repetitions possible: int64 (T,)."""

    copies: tuple[CopyPlan, ...]
    """Crop, flip, augmentation and mask of each of the `data.copies` copies."""


class Sampler:
    """Sampler of clips: a plan for every clip of every epoch. Picklable; it holds a few numbers per usable video.

    An epoch has `clips` clips (`steps_per_epoch` uses the same number): `clips_per_video` clips of each usable video,
    times the weight of its data set in a mixture.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, seed: int) -> None:
        self.rows = manifest.usable
        self.frames = manifest.frames[self.rows]
        self.sizes = np.stack([manifest.height[self.rows], manifest.width[self.rows]], axis=1)
        self.dataset = manifest.dataset[self.rows]
        self.components = mixture_components(manifest, data)
        self.data = data
        self.model = model
        self.seed = seed

    @property
    def clips(self) -> int:
        """Number of clips of one epoch, without copies."""
        return sum(part.clips for part in self.components)

    def plan(self, epoch: int, i: int, attempt: int = 0) -> ClipPlan:
        """Draw all random choices of clip `i` of an epoch.

        Args:
            epoch: number of the epoch, from 0.
            i: number of the clip in the epoch, 0 <= i < clips.
            attempt: 0 for the clip itself; n for its n-th substitute, a clip of a random video, which replaces a clip
                whose video cannot be decoded.
        """
        rng = _generator(_CLIP, self.seed, epoch, i, attempt)
        video = int(rng.integers(len(self.rows))) if attempt else draw_video(self.seed, epoch, i, self.components)
        height, width = self.sizes[video].tolist()
        data, model = self.data, self.model
        frames = self.draw_frames(rng, video)
        copies = []
        for copy in range(data.copies):
            # The first copy continues the generator of the clip, so that it does not depend on the number of copies.
            rng = _generator(_CLIP, self.seed, epoch, i, attempt, copy) if copy else rng
            crop = draw_crop(rng, data.crop, height, width, model.input_size)
            flip = bool(rng.random() < data.flip)
            visible, masked = draw_mask(rng, data.mask, model.grid)
            augment = draw_augmentation(rng, data.augment, model.frames, model.input_size)
            copies.append(CopyPlan(crop, flip, augment, visible, masked))
        return ClipPlan(int(self.rows[video]), frames, tuple(copies))

    def draw_frames(self, rng: Generator, video: int) -> NDArray[np.int64]:
        """Draw the frame numbers of a clip of usable video number `video`: int64 (T,), ascending."""
        stride = self.components[self.dataset[video]].stride
        return draw_frames(rng, self.data.sampling, int(self.frames[video]), self.model.frames, stride)


@dataclass(frozen=True)
class Part:
    """One data set of a mixture; a manifest without a mixture has one such component."""

    first: int
    """Index of its first video among the usable videos of the manifest."""

    videos: int
    """Number of its usable videos."""

    clips: int
    """Number of its clips in one epoch."""

    stride: int
    """Frames from one sampled frame to the next."""


def mixture_components(manifest: Manifest, data: DataConfig) -> tuple[Part, ...]:
    """Components of a mixture: videos, clips per epoch and stride of each data set."""
    counts = np.bincount(manifest.dataset[manifest.usable], minlength=len(data.mixture or [0])).tolist()
    shares = [(source.weight, source.stride) for source in (data.mixture or {}).values()] or [(1.0, None)]
    components, first = [], 0
    for videos, (weight, stride) in zip(counts, shares, strict=True):
        clips = max(round(weight * data.clips_per_video * videos), 1) if videos else 0
        components.append(Part(first, videos, clips, stride or data.stride))
        first += videos
    return tuple(components)


def draw_video(seed: int, epoch: int, i: int, components: tuple[Part, ...]) -> int:
    """Index, among the usable videos, of the video that clip `i` of an epoch shows.

    A permutation of the epoch maps i to a clip of a component. A component whose clips per epoch are not a multiple of
    its videos continues in the next epoch where it stopped, in an endless sequence of permutations of its videos:
    so over time all its videos are drawn equally often.
    """
    # The permutation covers the clips of all components in order; `clip` is reduced by the clips of each component that
    # it lies beyond, until it is a number within one component.
    clip = int(epoch_order(seed, epoch, sum(part.clips for part in components))[i])
    for number, part in enumerate(components):
        if clip < part.clips:
            # Clips of this component drawn since epoch 0 -> round through its videos, and place in that round.
            round_, place = divmod(epoch * part.clips + clip, part.videos)
            if part.clips % part.videos == 0:
                # Each epoch consists of whole rounds: the permutation of the epoch already shuffles the videos.
                return part.first + place
            return part.first + int(round_order(seed, round_, number, part.videos)[place])
        clip -= part.clips
    raise IndexError(i)


@dataclass(frozen=True)
class Share:
    """Positions of the stream that one rank prepares, in its order.

    Each rank takes one contiguous slice of a global batch and divides it into micro batches. The clips of an epoch that
    remain after its last whole global batch are dropped; each epoch drops others, since its order differs.
    """

    clips: int
    """Clips of an epoch, `Sampler.clips`."""

    global_batch: int
    """Clips of one optimizer step over all ranks, without copies."""

    rank: int
    world_size: int

    @property
    def clips_per_step(self) -> int:
        """Clips of one optimizer step on this rank."""
        return self.global_batch // self.world_size

    def position(self, n: int) -> int:
        """Position in the stream of this rank's n-th clip, counted from the start of training."""
        step, offset = divmod(n, self.clips_per_step)
        return step * self.global_batch + self.rank * self.clips_per_step + offset

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch, and number of the clip in the epoch, of a position in the stream."""
        return divmod(position, self.clips // self.global_batch * self.global_batch)


def steps_per_epoch(manifest: Manifest, data: DataConfig, global_batch: int) -> int:
    """Number of optimizer steps of one epoch: whole global batches; the remaining clips are dropped.

    Raises:
        UserError: an epoch has fewer clips than one global batch.
    """
    videos = len(manifest.usable)
    drawn = data.copies * sum(part.clips for part in mixture_components(manifest, data))
    steps = drawn // global_batch
    if not steps:
        raise UserError(
            f"an epoch of {videos} videos has {drawn} clips (data.clips_per_video {data.clips_per_video}, data.copies "
            f"{data.copies}), fewer than training.global_batch {global_batch}: expected at least one global batch. Set "
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
    """Order of one round through the videos of a mixture component: a permutation, int64 (videos,)."""
    return _generator(_ROUND, seed, round_, part).permutation(videos)


def draw_frames(rng: Generator, rule: str, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Draw frame numbers of a clip by a rule of `data.sampling`: int64 (frames,), ascending."""
    if rule == "dense":
        return dense_frames(rng, available, frames, stride)
    if rule == "window":
        return window_frames(rng, available, frames, stride)
    return segment_frames(rng, available, frames)


def dense_frames(rng: Generator, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Draw `frames` frame numbers that are `stride` apart, from a random start.

    The published pre-training rule (MVD, VideoMAE): the start is uniform over the positions where frames x stride
    frames fit into the video, or 0 if they do not fit. Numbers advance as long as they stay below the number of the
    last frame of the video; after that, the number reached is repeated.

    Returns:
        int64 (frames,), ascending, within 0 .. available - 1.
    """
    start = int(rng.integers(max(available - frames * stride + 1, 1)))
    steps = max((available - 2 - start) // stride, 0)
    return start + stride * np.minimum(np.arange(frames, dtype=np.int64), steps)


def window_frames(rng: Generator, available: int, frames: int, stride: int) -> NDArray[np.int64]:
    """Draw frame numbers that are spread evenly over a window of frames x stride frames, at a random position.

    The published fine-tuning rule for Kinetics, UCF101 and HMDB51. A video that is not longer than the window gives one
    frame for every `stride` frames, spread evenly, and then repeats its last frame.

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
    """Draw one random frame number from each of `frames` equal segments of the video (TSN).

    The published fine-tuning rule for Something-Something V2. As published, frames that remain at the end after the
    division are never drawn, and a video with fewer frames than segments gives its first frame only.

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
    """Draw a box in a frame of height x width pixels, to be resized to input_size x input_size."""
    if isinstance(crop, CornerCrop):
        return corner_crop(rng, crop.scales, height, width, input_size)
    if isinstance(crop, RandomResizedCrop):
        return random_resized_crop(rng, crop.area, crop.aspect, height, width)
    if isinstance(crop, ShortSideCrop):
        return short_side_crop(rng, crop.sides, height, width, input_size)
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def corner_crop(rng: Generator, scales: tuple[float, ...], height: int, width: int, input_size: int) -> Box:
    """Draw a multi-scale corner crop (TSN), as VideoMAE and MVD use it for pre-training.

    Height and width are the short side of the frame times one of `scales` each, at most one entry of the list apart. A
    side that differs from the input size by less than 3 pixels becomes the input size (but never exceeds the frame,
    which the published code pads in that case). The box takes one of 13 positions: those of a grid with steps of a
    quarter whose row and column are both even or both odd. Pairs of sides and positions are drawn uniformly.
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
    """Draw a box of random area and log-uniform aspect ratio (width over height), torchvision's rule, used by MAE.

    After ten draws that do not fit into the frame, it is the largest centred box of an allowed aspect ratio.
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
    """Draw the box that a square of `input_size` pixels covers after the short side is resized to a length in `sides`.

    The length (between the two `sides`, in pixels) and the position are drawn uniformly. The box is given in whole
    pixels of the frame before resizing.
    """
    short = min(height, width)
    side = min(round(input_size * short / int(rng.integers(sides[0], sides[1] + 1))), short)
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side, side


def draw_mask(
    rng: Generator, mask: MaskConfig | None, grid: tuple[int, int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the visible and masked tokens of a grid (time, height, width); V and M are the same in every draw.

    A tube mask hides int(ratio x height x width) patches, the same ones in every time slice (VideoMAE, Sec. 3.2);
    a random mask hides int(ratio x N) tokens. With `mask.decode_ratio` below 1, only the masked tokens to predict are
    returned.

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
    # Index of the first token of each time slice: added to the patches of one slice, it repeats the tube in all slices.
    starts = np.arange(slices, dtype=np.int64)[:, None] * len(order)
    visible, masked = (starts + np.sort(order[hidden:])).ravel(), (starts + np.sort(order[:hidden])).ravel()
    return visible, masked if mask.decode_ratio == 1 else masked[
        running_cell_mask(rng, mask.decode_ratio, grid)[masked]
    ]


def running_cell_mask(rng: Generator, share: float, grid: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Draw the tokens that decoders predict (VideoMAE V2, "dual masking"): 4 x share of each cell of 2 x 2 patches.

    The choice advances by one patch of the cell from each time slice to the next, so that four slices take every patch
    equally often. The start is random.

    Returns:
        bool (N,), time-major.
    """
    slices, height, width = grid
    # `place` is the index 0 to 3 of a patch within its cell. In time slice t, the patches with (place + start + t) % 4
    # below 4 x share are taken: all slices together cover a cell evenly.
    place = np.arange(height)[:, None] % 2 * 2 + np.arange(width) % 2
    turn = np.arange(slices)[:, None, None] + int(rng.integers(4))
    taken: NDArray[np.bool_] = (place + turn) % 4 < round(4 * share)
    return taken.ravel()


def box_generator(seed: int, epoch: int, i: int, attempt: int) -> Generator:
    """Random generator for the jitter of boxes in a clip (action detection); arguments as `Sampler.plan`."""
    return _generator(_BOXES, seed, epoch, i, attempt)


def _generator(*key: int) -> Generator:
    return Generator(Philox(SeedSequence(key)))
