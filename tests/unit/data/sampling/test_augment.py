from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import rgb_to_hsv
from numpy.random import default_rng
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from skimage import data as pictures
from timm.data import auto_augment as timm_ops

from mvd_scale.config.data import AugmentConfig, ColorJitter, RandAugment, RandomErasing
from mvd_scale.data.decoding.dali_augment import apply_operation, erase
from mvd_scale.data.sampling.augment import (
    Operation,
    count_operations,
    draw_augmentation,
    draw_erase_box,
    make_operation,
)

T, SIDE = 3, 64
FILL = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR}

TIMM = {  # the same operation in timm, on PIL images
    "autocontrast": (timm_ops.auto_contrast, None),
    "equalize": (timm_ops.equalize, None),
    "invert": (timm_ops.invert, None),
    "rotate": (timm_ops.rotate, timm_ops._rotate_level_to_arg),
    "posterize": (timm_ops.posterize, timm_ops._posterize_increasing_level_to_arg),
    "solarize": (timm_ops.solarize, timm_ops._solarize_increasing_level_to_arg),
    "solarize_add": (timm_ops.solarize_add, timm_ops._solarize_add_level_to_arg),
    "color": (timm_ops.color, timm_ops._enhance_increasing_level_to_arg),
    "contrast": (timm_ops.contrast, timm_ops._enhance_increasing_level_to_arg),
    "brightness": (timm_ops.brightness, timm_ops._enhance_increasing_level_to_arg),
    "sharpness": (timm_ops.sharpness, timm_ops._enhance_increasing_level_to_arg),
    "shear_x": (timm_ops.shear_x, timm_ops._shear_level_to_arg),
    "shear_y": (timm_ops.shear_y, timm_ops._shear_level_to_arg),
    "translate_x": (timm_ops.translate_x_rel, timm_ops._translate_rel_level_to_arg),
    "translate_y": (timm_ops.translate_y_rel, timm_ops._translate_rel_level_to_arg),
}

LARGEST = {"rotate": 2, "shear_x": 1, "shear_y": 1, "translate_x": 1, "translate_y": 1, "equalize": 6, "sharpness": 1}
"""Allowed mean difference in levels: PIL differs at borders (warps, sharpness) and in rounding (equalize)."""


def clip() -> NDArray[np.uint8]:
    """Three different real pictures."""
    picture = pictures.astronaut()
    return np.stack([picture[40 * k : 40 * k + SIDE * 4 : 4, 100 : 100 + SIDE * 4 : 4] // (k + 1) for k in range(T)])


def by_pil(name: str, share: float, sign: float) -> NDArray[np.uint8]:
    function, level_to_arg = TIMM[name]
    arguments: tuple[float, ...] = () if level_to_arg is None else level_to_arg(10 * share, {"translate_pct": 0.45})
    if name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        arguments = (sign * abs(arguments[0]),)
    elif name in ("color", "contrast", "brightness", "sharpness"):
        arguments = (max(0.1, 1 + sign * share * 0.9),)
    return np.stack([np.asarray(function(Image.fromarray(frame), *arguments, **FILL)) for frame in clip()])


def by_graph(operations: list[tuple[Operation, tuple[float, ...]]]) -> NDArray[np.uint8]:
    values = np.zeros((len(operations), 6), np.float32)
    for number, (_, value) in enumerate(operations):
        values[number, : len(value)] = value

    @pipeline_def(batch_size=len(operations), num_threads=1, device_id=None, enable_conditionals=True)
    def graph():
        frames = fn.external_source(lambda: [clip()] * len(operations), layout="FHWC", dtype=types.UINT8, ndim=4)
        codes = [np.array(operation, np.int32) for operation, _ in operations]
        operation = fn.external_source(lambda: codes, dtype=types.INT32, ndim=0)
        value = fn.external_source(lambda: list(values), dtype=types.FLOAT, ndim=1)
        return apply_operation(frames, operation, value, on_gpu=False)

    (result,) = graph().run()
    return np.stack([np.array(result[k]) for k in range(len(operations))])


def test_every_operation_of_a_mixed_batch_does_what_pil_does():
    cases = [(name, share, sign) for name in TIMM for share, sign in ((0.7, 1.0), (0.4, -1.0))]
    got = by_graph([make_operation(name, share, sign, SIDE) for name, share, sign in cases])
    for (name, share, sign), result in zip(cases, got, strict=True):
        expected = by_pil(name, share, sign)
        difference = np.abs(result.astype(int) - expected)
        if name in LARGEST:
            assert difference.mean() < LARGEST[name], (name, difference.mean())
        else:
            assert difference.max() <= 1, (name, share, sign, difference.max())
        assert np.abs(expected.astype(int) - clip()).mean() > 2 * difference.mean(), name


def test_hues_turn_by_the_angle_and_greys_stay():
    angles = (20.0, -20.0)
    before = rgb_to_hsv(clip()[0] / 255)
    coloured = (before[..., 1] > 0.4) & (before[..., 2] > 0.3)
    for angle, turned in zip(angles, by_graph([(Operation.HUE, (angle,)) for angle in angles]), strict=True):
        after = rgb_to_hsv(turned[0] / 255)
        shift = ((after[..., 0] - before[..., 0])[coloured] * 360 + 180) % 360 - 180
        assert np.sign(np.median(shift)) == np.sign(angle)
        assert abs(np.median(shift) - angle) < 8
        grey = np.ptp(clip()[0].astype(int), axis=-1) < 3
        assert np.abs(turned[0].astype(int) - clip()[0])[grey].max() <= 3
    assert np.abs(by_graph([(Operation.HUE, (0.0,))])[0].astype(int) - clip()).max() <= 2


def test_a_hue_is_drawn_only_where_one_is_asked_for():
    for hue, expected in ((0.0, 3), (20.0, 4)):
        augment = AugmentConfig(color_jitter=ColorJitter(hue=hue))
        drawn = draw_augmentation(default_rng(0), augment, T, SIDE)
        assert len(drawn.operations) == count_operations(augment) == expected
    assert drawn.operations[-1] == Operation.HUE
    assert 0 < abs(drawn.values[-1, 0]) <= 20


def test_what_is_not_applied_changes_nothing():
    assert np.array_equal(by_graph([(Operation.NONE, ())])[0], clip())


@pytest.mark.parametrize("box", [(10, 20, 30, 15), (0, 0, 5, 5), (50, 40, 14, 24), (0, 0, 0, 0)])
def test_an_erased_box_holds_the_noise_and_nothing_else_changes(box):
    top, left, height, width = box
    noise = default_rng(0).integers(0, 256, (T, height, width, 3)).astype(np.uint8)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():
        frames = fn.external_source(lambda: [clip()], layout="FHWC", dtype=types.UINT8, ndim=4)
        where = fn.external_source(lambda: [np.array(box, np.int32)], dtype=types.INT32, ndim=1)
        filling = fn.external_source(lambda: [noise], layout="FHWC", dtype=types.UINT8, ndim=4)
        return erase(frames, where, filling, SIDE, on_gpu=False)

    expected = clip()
    expected[:, top : top + height, left : left + width] = noise
    assert np.array_equal(np.array(graph().run()[0][0]), expected)


def test_operations_are_drawn_alike_and_half_of_them_applied():
    augment = AugmentConfig(rand_augment=RandAugment())
    drawn = [draw_augmentation(default_rng(seed), augment, T, SIDE) for seed in range(2000)]
    assert all(len(one.operations) == 4 and one.values.shape == (4, 6) for one in drawn)
    counts = Counter(int(code) for one in drawn for code in one.operations)
    assert counts[Operation.NONE] / 8000 == pytest.approx(0.5, abs=0.03)
    # Of the fifteen operations, five are warps and two solarize.
    assert counts[Operation.WARP] / 8000 == pytest.approx(0.5 * 5 / 15, abs=0.02)
    assert counts[Operation.SOLARIZE] / 8000 == pytest.approx(0.5 * 2 / 15, abs=0.02)
    assert set(counts) == set(Operation) - {Operation.HUE}
    factors = [one.values[k, 0] for one in drawn for k in range(4) if one.operations[k] == Operation.BRIGHTNESS]
    assert min(factors) == pytest.approx(1 - 0.7 * 0.9, abs=0.2)
    assert max(factors) == pytest.approx(1 + 0.7 * 0.9, abs=0.2)


def test_jitter_draws_within_its_range():
    augment = AugmentConfig(color_jitter=ColorJitter(brightness=0.2, contrast=0.4, saturation=0))
    drawn = [draw_augmentation(default_rng(seed), augment, T, SIDE) for seed in range(300)]
    assert {tuple(one.operations) for one in drawn} == {
        (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.SATURATION)
    }
    values = np.stack([one.values[:, 0] for one in drawn])
    assert values.min(axis=0) == pytest.approx([0.8, 0.6, 1], abs=0.02)
    assert values.max(axis=0) == pytest.approx([1.2, 1.4, 1], abs=0.02)


@given(seed=st.integers(0, 500), side=st.integers(8, 224))
def test_an_erased_box_lies_inside_the_frame(seed, side):
    top, left, height, width = draw_erase_box(default_rng(seed), RandomErasing(probability=1), side)
    assert 0 <= top <= top + height <= side
    assert 0 <= left <= left + width <= side


def test_erasing_is_as_frequent_and_as_large_as_asked():
    boxes = [draw_erase_box(default_rng(seed), RandomErasing(), 224) for seed in range(4000)]
    areas = [height * width / 224**2 for _, _, height, width in boxes if height]
    assert len(areas) / 4000 == pytest.approx(0.25, abs=0.03)
    assert min(areas) == pytest.approx(0.02, abs=0.005)
    assert max(areas) == pytest.approx(1 / 3, abs=0.02)


def test_the_noise_is_normal_after_normalisation():
    augment = AugmentConfig(erasing=RandomErasing(probability=1, area=(0.3, 0.33), aspect=(1, 1.01)))
    noise = draw_augmentation(default_rng(0), augment, 8, 224).noise
    assert noise.shape[0] == 8
    normalised = (noise / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert normalised.mean() == pytest.approx(0, abs=0.05)
    assert normalised.std() == pytest.approx(1, abs=0.12)  # clipped at black and white
    assert not np.array_equal(noise[0], noise[1])


def test_no_augmentation_draws_nothing():
    nothing = draw_augmentation(default_rng(0), AugmentConfig(), T, SIDE)
    assert nothing.operations.shape == (0,)
    assert nothing.noise.size == 0
