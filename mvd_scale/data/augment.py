"""What is random about the augmentation of a clip, decided on the host: operations and their values, not pixels.

RandAugment is timm's `rand-m7-n4-mstd0.5-inc1`, with which the published code fine-tunes: every operation takes one
value for all frames of a clip.

Legend: T frames, K operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mvd_scale.config.data import AugmentConfig, RandAugment, RandomErasing

Value = tuple[float, ...]
"""Up to six numbers: the value of an operation."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Operation(IntEnum):
    """What the graph can do to a clip. The value of each is in brackets."""

    NONE = 0
    WARP = 1
    """[matrix of 2 x 3 that maps output pixels to input pixels]"""
    BRIGHTNESS = 2
    """[factor]"""
    CONTRAST = 3
    """[factor], about the mean grey of each frame"""
    SATURATION = 4
    """[factor]"""
    SHARPNESS = 5
    """[factor]"""
    POSTERIZE = 6
    """[step between the levels that are kept]"""
    SOLARIZE = 7
    """[level from which on pixels are inverted]"""
    SOLARIZE_ADD = 8
    """[addend], to levels below 128"""
    AUTOCONTRAST = 9
    EQUALIZE = 10
    HUE = 11
    """[degrees]"""


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of one copy of a clip."""

    operations: NDArray[np.int32]
    """Numbers of `Operation`, applied in this order: int32 (K,), K the same for all clips of a recipe."""

    values: NDArray[np.float32]
    """Their values: float32 (K, 6)."""

    erase: tuple[int, int, int, int]
    """Top, left, height and width of the box that is filled with noise, in pixels; height and width 0 for none."""

    noise: NDArray[np.uint8]
    """Its pixels: uint8 (T, height, width, 3)."""


def draw_augmentation(rng: Generator, augment: AugmentConfig, frames: int, side: int) -> Augmentation:
    """Draw what `augment` asks for, for a clip of `frames` square frames of `side` pixels."""
    drawn: list[tuple[Operation, Value]] = []
    if augment.rand_augment is not None:
        drawn += [_draw_operation(rng, augment.rand_augment, side) for _ in range(augment.rand_augment.operations)]
    if augment.color_jitter is not None:
        jitter = augment.color_jitter
        for operation, strength in (
            (Operation.BRIGHTNESS, jitter.brightness),
            (Operation.CONTRAST, jitter.contrast),
            (Operation.SATURATION, jitter.saturation),
        ):
            drawn.append((operation, (rng.uniform(1 - strength, 1 + strength),)))
        if jitter.hue:
            drawn.append((Operation.HUE, (rng.uniform(-jitter.hue, jitter.hue),)))
    values = np.zeros((len(drawn), 6), np.float32)
    for number, (_, value) in enumerate(drawn):
        values[number, : len(value)] = value
    box = (0, 0, 0, 0) if augment.erasing is None else draw_box(rng, augment.erasing, side)
    return Augmentation(
        operations=np.array([operation for operation, _ in drawn], np.int32),
        values=values,
        erase=box,
        noise=_draw_noise(rng, frames, box),
    )


def count_operations(augment: AugmentConfig) -> int:
    """K."""
    drawn = 0 if augment.rand_augment is None else augment.rand_augment.operations
    jitter = augment.color_jitter
    return drawn + (0 if jitter is None else 3 + bool(jitter.hue))


def draw_box(rng: Generator, erasing: RandomErasing, side: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of an erased box; all 0 if the clip is left alone, or nothing fits in ten draws."""
    if rng.random() >= erasing.probability:
        return 0, 0, 0, 0
    for _ in range(10):
        area = rng.uniform(*erasing.area) * side * side
        aspect = math.exp(rng.uniform(*np.log(erasing.aspect)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < side and 0 < width < side:
            return int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1)), height, width
    return 0, 0, 0, 0


def _draw_noise(rng: Generator, frames: int, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Normal noise of the normalised pixels, as pixels: uint8 (T, height, width, 3)."""
    noise = rng.standard_normal((frames, *box[2:], 3), dtype=np.float32)
    pixels = (noise * np.asarray(IMAGENET_STD, np.float32) + np.asarray(IMAGENET_MEAN, np.float32)) * 255
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def _draw_operation(rng: Generator, augment: RandAugment, side: int) -> tuple[Operation, Value]:
    """One of the fifteen, and its value at a strength about the recipe's."""
    name = _NAMES[int(rng.integers(len(_NAMES)))]
    share = float(np.clip(rng.normal(augment.magnitude, augment.deviation), 0, 10)) / 10
    sign = 1.0 if rng.random() < 0.5 else -1.0
    if rng.random() >= augment.probability:
        return Operation.NONE, ()
    return operation_at(name, share, sign, side)


_NAMES = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)

_FACTORS = {
    "color": Operation.SATURATION,
    "contrast": Operation.CONTRAST,
    "brightness": Operation.BRIGHTNESS,
    "sharpness": Operation.SHARPNESS,
}


def operation_at(name: str, share: float, sign: float, side: int) -> tuple[Operation, Value]:
    """An operation of the increasing set at a share (0..1) of its greatest strength.

    Args:
        name: one of the fifteen.
        share: of the greatest strength.
        sign: direction, 1 or -1, where there are two.
        side: of the frame, in pixels.
    """
    if name == "rotate":
        angle = math.radians(sign * share * 30)
        cos, sin, centre = math.cos(angle), math.sin(angle), side / 2
        # Counterclockwise about the centre.
        return Operation.WARP, (cos, -sin, centre * (1 - cos + sin), sin, cos, centre * (1 - sin - cos))
    if name == "shear_x":
        return Operation.WARP, (1, sign * share * 0.3, 0, 0, 1, 0)
    if name == "shear_y":
        return Operation.WARP, (1, 0, 0, sign * share * 0.3, 1, 0)
    if name == "translate_x":
        return Operation.WARP, (1, 0, sign * share * 0.45 * side, 0, 1, 0)
    if name == "translate_y":
        return Operation.WARP, (1, 0, 0, 0, 1, sign * share * 0.45 * side)
    if name in _FACTORS:
        return _FACTORS[name], (max(0.1, 1 + sign * share * 0.9),)
    if name == "posterize":
        return Operation.POSTERIZE, (2.0 ** (8 - (4 - int(share * 4))),)
    if name == "solarize":
        return Operation.SOLARIZE, (256 - min(256, int(share * 256)),)
    if name == "invert":
        return Operation.SOLARIZE, (0,)
    if name == "solarize_add":
        return Operation.SOLARIZE_ADD, (min(128, int(share * 110)),)
    return (Operation.EQUALIZE if name == "equalize" else Operation.AUTOCONTRAST), ()
