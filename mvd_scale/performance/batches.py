"""Batches in the place of a loader's: of an iterator, or of random pixels.

Legend: B clips, T frames, N tokens, V visible, M masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
import torch

from mvd_scale.data.batch import ClipBatch

if TYPE_CHECKING:
    from mvd_scale.config import MaskConfig, Recipe


class BatchLoader:
    """`BatchSource` that returns the batches of an iterator, none of whose clips were replaced."""

    substituted = 0

    def __init__(self, batches: Iterator[ClipBatch]) -> None:
        self.batches = batches

    def __next__(self) -> ClipBatch:
        return next(self.batches)


def random_batches(recipe: Recipe, clips: int, device: torch.device, sides: tuple[int, ...] = ()) -> BatchLoader:
    """Return a source of endlessly the same batch: random pixels with masks of the recipe.

    Args:
        recipe: recipe with the shape of clips and the rule of masks.
        clips: clips of a batch, B.
        device: device of the batch.
        sides: further input sides in pixels, see `ClipBatch.resized`.
    """
    return BatchLoader(repeat(random_batch(recipe, clips, device, sides)))


def random_batch(recipe: Recipe, clips: int, device: torch.device, sides: tuple[int, ...] = ()) -> ClipBatch:
    """Make a batch of random pixels with masks of the recipe; arguments as `random_batches`."""
    from mvd_scale.data.sampling.masks import draw_mask

    def tokens(mask: MaskConfig | None) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = [draw_mask(np.random.default_rng(clip), mask, recipe.model.grid) for clip in range(clips)]
        visible, masked = (torch.from_numpy(np.stack(places)).to(device) for places in zip(*drawn, strict=True))
        return visible, masked

    visible, masked = tokens(recipe.data.mask)
    own = {name: tokens(mask) for name, mask in recipe.own_masks.items()}

    def pixels(side: int) -> torch.Tensor:
        shape = (clips, recipe.model.frames, side, side, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    return ClipBatch(
        pixels=pixels(recipe.model.input_size),
        visible=visible,
        masked=masked,
        labels=torch.zeros(clips, dtype=torch.int64, device=device),
        video_ids=torch.zeros(clips, dtype=torch.int64),
        resized={side: pixels(side) for side in sides},
        own_visible={name: seen for name, (seen, _) in own.items()},
        own_masked={name: hidden for name, (_, hidden) in own.items()},
    )
