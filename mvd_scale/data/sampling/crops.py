"""Rules that choose the crop of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from mvd_scale.config.data import CenterCrop, CornerCrop, RandomResizedCrop, ShortSideCrop
from mvd_scale.data.sampling.eval_views import resized_size

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


@dataclass(frozen=True)
class CropPlan:
    """Crop of a clip: a box in the displayed frame, which may be resized as a whole first."""

    frame: tuple[int, int]
    """Height and width of the frame that the box is cut from, in pixels: the size of the displayed frame, or the size
    to which the whole frame is resized first."""

    box: Box
    """Box in that frame."""


def draw_crop(
    rng: Generator,
    crop: CornerCrop | RandomResizedCrop | ShortSideCrop | CenterCrop,
    height: int,
    width: int,
    input_size: int,
) -> CropPlan:
    """Draw the crop of frames of height x width pixels, to be resized to input_size x input_size."""
    if isinstance(crop, ShortSideCrop):
        return short_side_crop(rng, crop.sides, height, width, input_size)
    if isinstance(crop, CornerCrop):
        box = corner_crop(rng, crop.scales, height, width, input_size)
    elif isinstance(crop, RandomResizedCrop):
        box = random_resized_crop(rng, crop.area, crop.aspect, height, width)
    else:
        side = min(height, width)
        box = (height - side) // 2, (width - side) // 2, side, side
    return CropPlan((height, width), box)


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
    """Draw a box of random area and log-uniform aspect ratio (width over height), by torchvision's rule, as MAE does.

    If ten drawn boxes do not fit into the frame, the result is the largest centred box of an allowed aspect ratio.

    Args:
        rng: random generator of the clip.
        area: smallest and largest area, as shares of the frame.
        aspect: smallest and largest aspect ratio.
        height: height of the frame in pixels.
        width: width of the frame in pixels.
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


def short_side_crop(rng: Generator, sides: tuple[int, int], height: int, width: int, input_size: int) -> CropPlan:
    """Draw a square of `input_size` pixels from frames whose short side is resized to a length in `sides`.

    The length (between the two `sides`, in pixels) and the position are drawn uniformly. The position is drawn as in
    the published code for AVA, which never takes the last one.
    """
    short = int(rng.integers(sides[0], sides[1] + 1))
    resized = resized_size(height, width, side=short)
    top, left = (int(rng.random() * (length - input_size)) for length in resized)
    return CropPlan(resized, (top, left, input_size, input_size))
