"""Boxes are transformed in the same way as the pixels."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from mvd_scale.config import CornerCrop, RandomResizedCrop, ShortSideCrop
from mvd_scale.config.data import AugmentConfig
from mvd_scale.data.sampling.augment import draw_augmentation
from mvd_scale.data.sampling.crops import draw_crop
from mvd_scale.data.sampling.sampler import CopyPlan
from mvd_scale.detection.boxes import Boxes, KeyFrame
from mvd_scale.detection.people import PersonBoxes, has_area, jitter_boxes, transform_boxes, widen_boxes

SIDE = 48
NONE = np.empty(0, np.int64)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(40, 160),
    width=st.integers(40, 160),
    crop=st.sampled_from([ShortSideCrop(sides=(48, 80)), CornerCrop(), RandomResizedCrop()]),
    flip=st.booleans(),
)
def test_a_rectangle_stays_under_its_box(seed: int, height: int, width: int, crop, flip: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = sorted(rng.integers(width + 1, size=2)), sorted(rng.integers(height + 1, size=2))
    frame = torch.zeros(height, width)
    frame[y[0] : y[1], x[0] : x[1]] = 1
    augment = draw_augmentation(rng, AugmentConfig(), frames=1, size=(height, width), side=SIDE)
    plan = CopyPlan(draw_crop(rng, crop, height, width, SIDE), flip, augment, NONE, NONE)

    top, left, crop_height, crop_width = plan.crop.box
    resized = interpolate(frame[None, None], size=plan.crop.frame, mode="bilinear", antialias=True)
    cut = resized[..., top : top + crop_height, left : left + crop_width]
    clip = interpolate(cut, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0, 0]
    clip = clip.flip(1) if flip else clip
    corners = np.array([[x[0] / width, y[0] / height, x[1] / width, y[1] / height]])
    box = transform_boxes(corners, plan, SIDE)
    # A filter moves no mass over a border but within the frame: sums tell edges to a part of a pixel.
    area = (box[:, 2:] - box[:, :2]).prod()
    assert abs(float(clip.sum()) - area) <= 0.03 * area + 2 * (box[0, 2] - box[0, 0] + box[0, 3] - box[0, 1]) + 1e-6
    rows, columns = (clip > 0.5).nonzero(as_tuple=True)
    if has_area(box)[0] and len(rows) and (box[0, 2:] - box[0, :2]).min() > 3:
        seen = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        np.testing.assert_allclose(seen, box[0], atol=1.01)
    assert len(rows) == 0 or has_area(box)[0]


def test_a_person_is_one_box_with_all_its_actions() -> None:
    a, b = KeyFrame("a", 902), KeyFrame("b", 902)
    left, right = [0, 0, 0.4, 1], [0.5, 0, 1, 1]
    truth = Boxes.of([a, b, a, a], [left, left, right, left], [1, 3, 2, 3], [1.0] * 4)
    people = PersonBoxes.of(truth, 3)
    assert people.on(0) == slice(0, 2)
    np.testing.assert_array_equal(people.corners[people.on(0)], [left, right])
    np.testing.assert_array_equal(people.actions, [[True, False, True], [False, True, False], [False, False, True]])
    assert people.on(2) == slice(3, 3)


@given(seed=st.integers(0, 10**6))
def test_jitter_moves_sides_as_far_as_it_may_and_no_further(seed: int) -> None:
    box = np.array([[10.0, 12.0, 30.0, 40.0]])
    moved = jitter_boxes(np.random.default_rng(seed), box, (0.2, 0.1, 0.1, 0.05), SIDE) - box
    assert (moved >= [[-4, -2.8, -2, -1.4]]).all()
    assert (moved <= [[2, 1.4, 4, 2.8]]).all()
    assert moved.any()
    np.testing.assert_array_equal(jitter_boxes(np.random.default_rng(seed), box, (0, 0, 0, 0), SIDE), box)


def test_a_widened_box_stays_within_the_frame() -> None:
    boxes = np.array([[10.0, 10.0, 30.0, 50.0], [0.0, 0.0, 100.0, 60.0]])
    np.testing.assert_allclose(widen_boxes(boxes, (0.1, 0.05), (60, 100)), [[9, 9, 31, 51], [0, 0, 100, 60]])
