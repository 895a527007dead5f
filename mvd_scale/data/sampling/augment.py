"""Random parameters of the augmentation of a clip, drawn on the host: operations and their values, not pixels.

RandAugment follows timm's `rand-m7-n4-mstd0.5-inc1`, which the published code uses for fine-tuning: each operation
applies one value to all frames of a clip, before the crop.

Legend: T frames, K operations of RandAugment, J values of colour jitter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mvd_scale.config.data import AugmentConfig, ColorJitter, RandAugment, RandomErasing

Value = tuple[float, ...]
"""Value of an operation: 0 to 6 numbers, see `Operation`."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Operation(IntEnum):
    """Operations of RandAugment on the frames of a clip. The value of each one is given in brackets."""

    NONE = 0
    WARP = 1
    """[matrix of 2 x 3 that maps positions (x, y, 1) in the output to positions in the input, in pixels; the middle of
    the first pixel is at (0.5, 0.5)]"""
    BRIGHTNESS = 2
    """[factor]"""
    CONTRAST = 3
    """[factor], about the mean grey of each frame"""
    SATURATION = 4
    """[factor]"""
    SHARPNESS = 5
    """[factor]"""
    POSTERIZE = 6
    """[difference between two levels that remain, 0 to 255]"""
    SOLARIZE = 7
    """[lowest level that is inverted, 0 to 256]"""
    SOLARIZE_ADD = 8
    """[addend] to levels below 128"""
    AUTOCONTRAST = 9
    EQUALIZE = 10


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of one copy of a clip: operations before the crop, jitter and an erased box after it."""

    operations: NDArray[np.int32]
    """Members of `Operation` in the order of application to whole displayed frames: int32 (K,); K is the same for all
    clips of a recipe."""

    values: NDArray[np.float64]
    """Values of the operations, padded with 0: float64 (K, 6)."""

    jitter: NDArray[np.float32]
    """Factors of brightness, contrast and saturation, then the rotation of the hue in degrees, if there is one, all for
    the resized crop: float32 (J,); J is the same for all clips of a recipe, 0 without colour jitter."""

    erase: tuple[int, int, int, int]
    """Top, left, height and width of the box of the resized crop that noise fills, in pixels; height and width are 0
    for no box."""

    noise: NDArray[np.uint8]
    """Pixels of the noise in the box: uint8 (T, height, width, 3)."""


def draw_augmentation(
    rng: Generator, augment: AugmentConfig, *, frames: int, size: tuple[int, int], side: int
) -> Augmentation:
    """Draw the augmentation of a clip by the rules of `augment`.

    Args:
        rng: random generator of the clip.
        augment: rules.
        frames: number of frames (T).
        size: height and width of the displayed frame in pixels.
        side: side of the resized crop in pixels.
    """
    drawn: list[tuple[Operation, Value]] = []
    if augment.rand_augment is not None:
        drawn += [_draw_operation(rng, augment.rand_augment, size) for _ in range(augment.rand_augment.operations)]
    values = np.zeros((len(drawn), 6))
    for number, (_, value) in enumerate(drawn):
        values[number, : len(value)] = value
    jitter = [] if augment.color_jitter is None else _draw_jitter(rng, augment.color_jitter)
    box = (0, 0, 0, 0) if augment.erasing is None else draw_erase_box(rng, augment.erasing, side)
    return Augmentation(
        operations=np.array([operation for operation, _ in drawn], np.int32),
        values=values,
        jitter=np.array(jitter, np.float32),
        erase=box,
        noise=_draw_noise(rng, frames, box),
    )


def _draw_jitter(rng: Generator, jitter: ColorJitter) -> list[float]:
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation)
    factors = [rng.uniform(1 - strength, 1 + strength) for strength in strengths]
    return factors + ([rng.uniform(-jitter.hue, jitter.hue)] if jitter.hue else [])


def draw_erase_box(rng: Generator, erasing: RandomErasing, side: int) -> tuple[int, int, int, int]:
    """Draw the box to erase: top, left, height and width in pixels.

    All four are 0 if no box is erased: with probability 1 - `erasing.probability`, or if a hundred drawn boxes do not
    fit.
    """
    if rng.random() >= erasing.probability:
        return 0, 0, 0, 0
    for _ in range(100):
        area = rng.uniform(*erasing.area) * side * side
        aspect = math.exp(rng.uniform(*np.log(erasing.aspect)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < side and 0 < width < side:
            return int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1)), height, width
    return 0, 0, 0, 0


def _draw_noise(rng: Generator, frames: int, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Draw noise that is standard normal after ImageNet normalisation: uint8 (T, height, width, 3)."""
    noise = rng.standard_normal((frames, *box[2:], 3), dtype=np.float32)
    pixels = (noise * np.asarray(IMAGENET_STD, np.float32) + np.asarray(IMAGENET_MEAN, np.float32)) * 255
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def _draw_operation(rng: Generator, augment: RandAugment, size: tuple[int, int]) -> tuple[Operation, Value]:
    """Draw one of the fifteen operations, with a strength that is normally distributed about `augment.magnitude`."""
    name = _NAMES[int(rng.integers(len(_NAMES)))]
    share = float(np.clip(rng.normal(augment.magnitude, augment.deviation), 0, 10)) / 10
    sign = 1.0 if rng.random() < 0.5 else -1.0
    if rng.random() >= augment.probability:
        return Operation.NONE, ()
    return make_operation(name, share, sign, size)


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


def make_operation(name: str, share: float, sign: float, size: tuple[int, int]) -> tuple[Operation, Value]:
    """Return an operation of timm's "increasing" set, and its value, at a given strength.

    Args:
        name: one of the fifteen names in `_NAMES`.
        share: strength as a share (0 to 1) of the greatest one.
        sign: direction, 1 or -1, for operations that have two.
        size: height and width of the frame in pixels.
    """
    matrix = _warp_matrix(name, sign * share, size)
    if matrix is not None:
        return Operation.WARP, tuple(round(number * _QUANTUM) / _QUANTUM for number in matrix)
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


_QUANTUM = 2.0**36
"""Numbers of a matrix are multiples of 1 / _QUANTUM: sums of products with positions below 8,192 pixels are then exact
in float64, so that a part of a frame is warped to the very pixels that it has in the whole warped frame."""


def _warp_matrix(name: str, amount: float, size: tuple[int, int]) -> Value | None:
    """Matrix of 2 x 3 that maps output to input positions, or None for operations that are no warps."""
    height, width = size
    if name == "rotate":
        angle = math.radians(30 * amount)
        cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
        # A counterclockwise rotation about the centre of the frame.
        return cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos
    if name == "shear_x":
        return 1, 0.3 * amount, 0, 0, 1, 0
    if name == "shear_y":
        return 1, 0, 0, 0.3 * amount, 1, 0
    if name == "translate_x":
        return 1, 0, 0.45 * amount * width, 0, 1, 0
    if name == "translate_y":
        return 1, 0, 0, 0, 1, 0.45 * amount * height
    return None
