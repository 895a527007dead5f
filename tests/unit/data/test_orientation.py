"""Orientations: matrices, EXIF tags, boxes and mirrorings agree with each other on all eight of them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from mvd_scale.data.decoding.sample_source import coded_box, flip_axes
from mvd_scale.data.manifest import Row
from mvd_scale.data.orientation import Orientation, orient, orientation_of_exif, orientation_of_matrix

EIGHT = [Orientation(rotation, mirrored) for rotation in (0, 90, 180, 270) for mirrored in (False, True)]
CODED = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)

each = pytest.mark.parametrize("orientation", EIGHT, ids=str)


def matrix_of(orientation: Orientation, scale: int = 1 << 16) -> np.ndarray:
    """Display matrix, found by where the axes of a coded picture point in the displayed one."""
    places = np.stack(np.meshgrid(np.arange(3), np.arange(3), indexing="ij"), -1).astype(np.uint8)
    shown = orient(np.concatenate([places, places[..., :1]], -1), *orientation)
    where = {tuple(value[:2].tolist()): (y, x) for y, row in enumerate(shown) for x, value in enumerate(row)}
    (y0, x0), (y1, x1), (y2, x2) = where[0, 0], where[0, 1], where[1, 0]
    a, b, c, d = x1 - x0, y1 - y0, x2 - x0, y2 - y0
    return np.array([a * scale, b * scale, 0, c * scale, d * scale, 0, 0, 0, 1 << 30], np.int32)


@each
def test_a_matrix_tells_its_orientation(orientation: Orientation) -> None:
    assert orientation_of_matrix(matrix_of(orientation)) == orientation
    blurred = matrix_of(orientation, 2 << 16) + np.array([3, -2, 0, 2, -3, 0, 9, 9, 0], np.int32)
    assert orientation_of_matrix(blurred) == orientation


def test_other_matrices() -> None:
    assert orientation_of_matrix(np.zeros(9, np.int32)) == Orientation()
    slanted = np.array([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30], np.int32)
    assert orientation_of_matrix(slanted) is None


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_tags_mean_what_pillow_does(tag: int) -> None:
    image = Image.fromarray(CODED)
    image.getexif()[274] = tag
    np.testing.assert_array_equal(orient(CODED, *orientation_of_exif(tag)), np.asarray(ImageOps.exif_transpose(image)))
    assert orientation_of_exif(0) == orientation_of_exif(9) == Orientation()


@each
@pytest.mark.parametrize("flip", [False, True])
def test_a_box_of_the_coded_frame_becomes_the_box_of_the_displayed_one(orientation: Orientation, flip: bool) -> None:
    shown = orient(CODED, *orientation)
    video = Row("", "", height=shown.shape[0], width=shown.shape[1], rotation=orientation[0], mirrored=orientation[1])
    assert video.coded_size == CODED.shape[:2]
    for box in [(0, 0, 2, 3), (1, 2, 3, 2), (2, 1, 3, 4)]:
        (top, left, height, width), (y, x, h, w) = box, coded_box(box, (video.height, video.width), video)
        cut = CODED[y : y + h, x : x + w]
        if video.rotation % 180:
            cut = cut.transpose(1, 0, 2)
        left_right, up_down = flip_axes(flip, video)
        cut = cut[:: -1 if up_down else 1, :: -1 if left_right else 1]
        expected = shown[top : top + height, left : left + width]
        np.testing.assert_array_equal(cut, expected[:, ::-1] if flip else expected)
