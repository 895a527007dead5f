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
from PIL import Image, ImageEnhance
from skimage import data as pictures

from mvd_scale.config.data import AugmentConfig, ColorJitter, RandAugment, RandomErasing
from mvd_scale.data.decoding.dali_augment import color_jitter, erase
from mvd_scale.data.sampling.augment import Augmentation, Operation, draw_augmentation, draw_erase_box

T, SIDE = 3, 64


def clip() -> NDArray[np.uint8]:
    """Three different real pictures."""
    picture = pictures.astronaut()
    return np.stack([picture[40 * k : 40 * k + SIDE * 4 : 4, 100 : 100 + SIDE * 4 : 4] // (k + 1) for k in range(T)])


def jittered(values: NDArray[np.float32], jitter: ColorJitter) -> NDArray[np.uint8]:
    """The clip under each row of values."""

    @pipeline_def(batch_size=len(values), num_threads=1, device_id=None)
    def graph():
        frames = fn.external_source(lambda: [clip()] * len(values), layout="FHWC", dtype=types.UINT8, ndim=4)
        value = fn.external_source(lambda: list(values), dtype=types.FLOAT, ndim=1)
        return color_jitter(frames, value, jitter, on_gpu=False)

    (result,) = graph().run()
    return np.stack([np.array(result[k]) for k in range(len(values))])


def draw(augment: AugmentConfig, seed: int = 0, *, frames: int = T, side: int = SIDE) -> Augmentation:
    return draw_augmentation(default_rng(seed), augment, frames=frames, size=(96, 128), side=side)


@pytest.mark.parametrize("values", [(0.7, 1.3, 0.6), (1.2, 0.5, 1.4)])
def test_jitter_is_brightness_contrast_and_saturation_of_pil_in_this_order(values):
    (got,) = jittered(np.array([values], np.float32), ColorJitter(hue=0))
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for frame, result in zip(clip(), got, strict=True):
        picture = Image.fromarray(frame)
        for enhancer, factor in zip(enhancers, values, strict=True):
            picture = enhancer(picture).enhance(factor)
        assert np.abs(result.astype(int) - np.asarray(picture)).max() <= 2


def test_hues_turn_by_the_angle_and_greys_stay():
    angles = (20.0, -20.0)
    before = rgb_to_hsv(clip()[0] / 255)
    coloured = (before[..., 1] > 0.4) & (before[..., 2] > 0.3)
    values = np.array([(1, 1, 1, angle) for angle in (*angles, 0)], np.float32)
    *both, still = jittered(values, ColorJitter(hue=20))
    for angle, turned in zip(angles, both, strict=True):
        after = rgb_to_hsv(turned[0] / 255)
        shift = ((after[..., 0] - before[..., 0])[coloured] * 360 + 180) % 360 - 180
        assert np.sign(np.median(shift)) == np.sign(angle)
        assert abs(np.median(shift) - angle) < 8
        grey = np.ptp(clip()[0].astype(int), axis=-1) < 3
        assert np.abs(turned[0].astype(int) - clip()[0])[grey].max() <= 3
    assert np.abs(still.astype(int) - clip()).max() <= 2


def test_a_hue_is_drawn_only_where_one_is_asked_for():
    for hue, expected in ((0.0, 3), (20.0, 4)):
        augment = AugmentConfig(color_jitter=ColorJitter(hue=hue))
        drawn = draw(augment)
        assert drawn.jitter.shape == (expected,)
        assert drawn.operations.shape == (0,)
    assert 0 < abs(drawn.jitter[-1]) <= 20


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
    drawn = [draw(augment, seed) for seed in range(2000)]
    assert all(len(one.operations) == 4 and one.values.shape == (4, 6) for one in drawn)
    counts = Counter(int(code) for one in drawn for code in one.operations)
    assert counts[Operation.NONE] / 8000 == pytest.approx(0.5, abs=0.03)
    # Of the fifteen operations, five are warps and two solarize.
    assert counts[Operation.WARP] / 8000 == pytest.approx(0.5 * 5 / 15, abs=0.02)
    assert counts[Operation.SOLARIZE] / 8000 == pytest.approx(0.5 * 2 / 15, abs=0.02)
    assert set(counts) == set(Operation)
    factors = [one.values[k, 0] for one in drawn for k in range(4) if one.operations[k] == Operation.BRIGHTNESS]
    assert min(factors) == pytest.approx(1 - 0.7 * 0.9, abs=0.2)
    assert max(factors) == pytest.approx(1 + 0.7 * 0.9, abs=0.2)


def test_warps_are_drawn_for_the_whole_frame():
    augment = AugmentConfig(rand_augment=RandAugment(operations=1, magnitude=10, deviation=0, probability=1))
    warps = [
        one.values[0] for one in (draw(augment, seed) for seed in range(300)) if one.operations[0] == Operation.WARP
    ]
    shifts = {
        (round(value[2], 6), round(value[5], 6)) for value in warps if (value[[0, 1, 3, 4]] == [1, 0, 0, 1]).all()
    }
    assert shifts == {(57.6, 0), (-57.6, 0), (0, 43.2), (0, -43.2)}  # 0.45 of 128 and of 96 pixels
    turns = [value.reshape(2, 3) for value in warps if value[0] < 1]
    assert turns
    for turn in turns:
        np.testing.assert_allclose(turn @ [64, 48, 1], [64, 48], atol=1e-6)
        assert turn[0, 0] == pytest.approx(np.cos(np.pi / 6))


def test_jitter_draws_within_its_range():
    augment = AugmentConfig(color_jitter=ColorJitter(brightness=0.2, contrast=0.4, saturation=0))
    drawn = [draw(augment, seed) for seed in range(300)]
    values = np.stack([one.jitter for one in drawn])
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
    noise = draw(augment, frames=8, side=224).noise
    assert noise.shape[0] == 8
    normalised = (noise / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert normalised.mean() == pytest.approx(0, abs=0.05)
    assert normalised.std() == pytest.approx(1, abs=0.12)  # clipped at black and white
    assert not np.array_equal(noise[0], noise[1])


def test_no_augmentation_draws_nothing():
    nothing = draw(AugmentConfig())
    assert nothing.operations.shape == (0,)
    assert nothing.jitter.size == nothing.noise.size == 0
