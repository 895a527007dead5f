"""Sampling: pure functions from a position in the stream of clips to frames, crop, flip, augmentation and mask.

The stream is endless and the same for all ranks: position p is clip i of some epoch, and all random choices for that
clip are a function of (seed, epoch, i). The numbers of ranks and workers, and restarts, only decide who prepares it.

Legend: T frames, N tokens, V visible, M masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mvd_scale.config.data import DataConfig, MaskConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.augment import Augmentation, draw_augmentation
from mvd_scale.data.sampling.crops import CropPlan, draw_crop
from mvd_scale.data.sampling.frames import draw_frames
from mvd_scale.data.sampling.masks import draw_mask
from mvd_scale.data.sampling.permutation import Permutation, draw_permutation, keyed_generator
from mvd_scale.errors import UserError

_ORDER, _CLIP, _ROUND, _BOXES = 1, 2, 3, 4
"""First entries of random generator keys, so that different uses never share random numbers."""


@dataclass(frozen=True)
class CopyPlan:
    """All random choices for one copy of a clip."""

    crop: CropPlan
    """Box of the crop in the displayed frame."""

    flip: bool
    """Whether to flip the clip left to right."""

    augment: Augmentation
    """Operations before the crop, jitter and an erased box after it."""

    visible: NDArray[np.int64]
    """Indices of the visible tokens, ascending, time-major: int64 (V,); then those of each further mask."""

    masked: NDArray[np.int64]
    """Indices of the masked tokens to predict, ascending, time-major: int64 (M,); then those of each further mask."""


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
    """Sampler of clips: a plan for every clip of every epoch. Picklable; as small as the pickle of its manifest.

    An epoch has `clips` clips (`steps_per_epoch` uses the same number): `clips_per_video` clips of each usable video,
    times the weight of its data set in a mixture.

    Args:
        manifest: manifest of the videos.
        data: sampling, crop, augmentation and mask of clips.
        model: model config, which sets the shape of a clip.
        seed: seed of all random choices.
        masks: further masks, each drawn as if it stood in the place of `data.mask`.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        model: ModelConfig,
        seed: int,
        masks: Sequence[MaskConfig | None] = (),
    ) -> None:
        self.manifest = manifest
        self.components = mixture_components(manifest, data)
        self.data = data
        self.model = model
        self.seed = seed
        self.masks = masks

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the usable videos, ascending: int64 (videos,)."""
        return self.manifest.usable

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
        data, model, manifest = self.data, self.model, self.manifest
        video = int(rng.integers(len(self.rows))) if attempt else draw_video(self.seed, epoch, i, self.components)
        row = int(self.rows[video])
        height, width = int(manifest.height[row]), int(manifest.width[row])
        frames = self.draw_frames(rng, video)
        copies = []
        for copy in range(data.copies):
            # The first copy continues the generator of the clip, so that it does not depend on the number of copies.
            rng = _generator(_CLIP, self.seed, epoch, i, attempt, copy) if copy else rng
            crop = draw_crop(rng, data.crop, height, width, model.input_size)
            flip = bool(rng.random() < data.flip)
            visible, masked = self._draw_masks(rng)
            augment = draw_augmentation(
                rng, data.augment, frames=model.frames, size=(height, width), side=model.input_size
            )
            copies.append(CopyPlan(crop, flip, augment, visible, masked))
        return ClipPlan(row, frames, tuple(copies))

    def _draw_masks(self, rng: Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw the mask of the recipe and the further ones; the generator goes on as after the first alone."""
        before, grid = rng.bit_generator.state, self.model.grid
        others = []
        for mask in self.masks:
            others.append(draw_mask(rng, mask, grid))
            rng.bit_generator.state = before
        visible, masked = zip(draw_mask(rng, self.data.mask, grid), *others, strict=True)
        return np.concatenate(visible), np.concatenate(masked)

    def draw_frames(self, rng: Generator, video: int) -> NDArray[np.int64]:
        """Draw the frame numbers of a clip of usable video number `video`: int64 (T,), ascending."""
        row = self.rows[video]
        stride = self.components[self.manifest.dataset[row] if self.data.mixture else 0].stride
        return draw_frames(rng, self.data.sampling, int(self.manifest.frames[row]), self.model.frames, stride)


@dataclass(frozen=True)
class MixtureComponent:
    """One data set of a mixture; a manifest without a mixture has one such component."""

    first: int
    """Index of its first video among the usable videos of the manifest."""

    videos: int
    """Number of its usable videos."""

    clips: int
    """Number of its clips in one epoch."""

    stride: int
    """Frames from one sampled frame to the next."""


def mixture_components(manifest: Manifest, data: DataConfig) -> tuple[MixtureComponent, ...]:
    """List videos, clips per epoch and stride of each data set of a mixture; without one, all videos are one set."""
    # A manifest that was saved from a mixture numbers its data sets also where it is the only source.
    counts = manifest.dataset_sizes if data.mixture else [len(manifest.usable)]
    counts += [0] * (len(data.mixture or [0]) - len(counts))
    shares = [(source.weight, source.stride) for source in (data.mixture or {}).values()] or [(1.0, None)]
    components, first = [], 0
    for videos, (weight, stride) in zip(counts, shares, strict=True):
        clips = max(round(weight * data.clips_per_video * videos), 1) if videos else 0
        components.append(MixtureComponent(first, videos, clips, stride or data.stride))
        first += videos
    return tuple(components)


def draw_video(seed: int, epoch: int, i: int, components: tuple[MixtureComponent, ...]) -> int:
    """Return the index, among the usable videos, of the video that clip `i` of an epoch shows.

    A permutation of the epoch maps i to a clip of a component. A component whose clips per epoch are not a multiple of
    its videos continues in the next epoch where it stopped, in an endless sequence of permutations of its videos:
    so over time all its videos are drawn equally often.

    Raises:
        IndexError: `i` is not below the number of clips of an epoch.
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
class RankShard:
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
        """Return the position in the stream of this rank's n-th clip, counted from the start of training."""
        step, offset = divmod(n, self.clips_per_step)
        return step * self.global_batch + self.rank * self.clips_per_step + offset

    def locate(self, position: int) -> tuple[int, int]:
        """Return the epoch of a position in the stream, and the number of its clip in that epoch."""
        return divmod(position, self.clips // self.global_batch * self.global_batch)


def steps_per_epoch(manifest: Manifest, data: DataConfig, global_batch: int) -> int:
    """Compute the number of optimizer steps per epoch: whole global batches; the remaining clips are dropped.

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
def epoch_order(seed: int, epoch: int, clips: int) -> Permutation:
    """Draw the order of an epoch: a permutation of its clips."""
    return draw_permutation((_ORDER, seed, epoch), clips)


# The clips of an epoch are of all components and, for each, of a few rounds, in random order.
@lru_cache(maxsize=64)
def round_order(seed: int, round_: int, part: int, videos: int) -> Permutation:
    """Draw the order of one round through the videos of a mixture component: a permutation of them."""
    return draw_permutation((_ROUND, seed, round_, part), videos)


def box_generator(seed: int, epoch: int, i: int, attempt: int) -> Generator:
    """Create the random generator for the jitter of boxes in a clip (action detection); see `Sampler.plan`."""
    return _generator(_BOXES, seed, epoch, i, attempt)


def _generator(*key: int) -> Generator:
    return keyed_generator(key)
