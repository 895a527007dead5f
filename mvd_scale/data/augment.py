"""What is random about the augmentation of a clip, decided on the host: operations and their values, not pixels.

Legend: T frames, K operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mvd_scale.config.data import AugmentConfig


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of one copy of a clip."""

    operations: NDArray[np.int32]
    """Numbers of `OPERATIONS`, applied in this order: int32 (K,), K the same for all clips of a recipe."""

    values: NDArray[np.float32]
    """Argument of each: float32 (K,)."""

    erase: tuple[int, int, int, int]
    """Top, left, height and width of the box that is filled with noise, in pixels; height and width 0 for none."""

    noise: NDArray[np.uint8]
    """Its pixels: uint8 (T, height, width, 3)."""


def draw_augmentation(rng: Generator, augment: AugmentConfig, frames: int, side: int) -> Augmentation:
    """Draw what `augment` asks for, for a clip of `frames` square frames."""
    nothing = np.zeros((frames, 0, 0, 3), dtype=np.uint8)
    return Augmentation(np.zeros(0, np.int32), np.zeros(0, np.float32), (0, 0, 0, 0), nothing)
