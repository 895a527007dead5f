"""RandAugment on regions equals RandAugment on whole frames by PIL (timm), cut to the region afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from skimage import data as pictures
from timm.data import auto_augment as timm_ops

from mvd_scale.data.decoding.bicubic_warp import warp_function
from mvd_scale.data.decoding.dali_augment import rand_augment_by_dali, rand_augment_on_host
from mvd_scale.data.decoding.frame_operations import apply_operations
from mvd_scale.data.decoding.sample_source import CodedCopy, flip_axes
from mvd_scale.data.manifest import Row
from mvd_scale.data.sampling.augment import Augmentation, make_operation
from mvd_scale.data.sampling.crops import Box, CropPlan
from mvd_scale.data.sampling.sampler import CopyPlan

FRAMES, HEIGHT, WIDTH = 2, 97, 130
POOL = ThreadPoolExecutor(2)
NONE = np.empty(0, np.int64)
OPTIONS = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
"""Those of the published fine-tuning."""

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
WARPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
STATISTICS = ("contrast", "autocontrast", "equalize")


class Drawn(NamedTuple):
    """An operation as timm draws it."""

    name: str
    share: float
    sign: float


SHARES = st.integers(50, 999).map(lambda n: (n + 0.1234567) / 1000)
"""Not round, as drawn shares are: a shift by exactly half a pixel turns the last digit of a sum into a level."""

OPERATION = st.builds(Drawn, st.sampled_from(sorted(TIMM)), SHARES, st.sampled_from([-1.0, 1.0]))


def clip(height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Two different real pictures without black and white, so that every operation changes them."""
    picture = pictures.astronaut() * 0.8 + 20
    return np.stack([picture[80 * k : 80 * k + height, 150 : 150 + width] for k in range(FRAMES)]).astype(np.uint8)


def by_timm(frame: NDArray[np.uint8], drawn: Sequence[Drawn]) -> NDArray[np.uint8]:
    picture = Image.fromarray(frame)
    for name, share, sign in drawn:
        function, level_to_arg = TIMM[name]
        arguments: tuple[float, ...] = () if level_to_arg is None else level_to_arg(10 * share, {"translate_pct": 0.45})
        if name in WARPS:
            arguments = (sign * abs(arguments[0]),)
        elif level_to_arg is timm_ops._enhance_increasing_level_to_arg:
            arguments = (max(0.1, 1 + sign * share * 0.9),)
        picture = function(picture, *arguments, **OPTIONS)
    return np.asarray(picture)


def planned(
    drawn: Sequence[Drawn], box: Box, size: tuple[int, int] = (HEIGHT, WIDTH), rotation: int = 0, mirrored: bool = False
) -> CodedCopy:
    """A copy of a clip with these operations and this crop, as the source sends it to the graph."""
    made = [make_operation(*one, size) for one in drawn]
    values = np.zeros((len(made), 6))
    for k, (_, value) in enumerate(made):
        values[k, : len(value)] = value
    codes = np.array([operation for operation, _ in made], np.int32)
    nothing = (0, 0, 0, 0), np.zeros((FRAMES, 0, 0, 3), np.uint8)
    augment = Augmentation(codes, values, np.empty(0, np.float32), *nothing)
    video = Row(name="", path="", height=size[0], width=size[1], rotation=rotation, mirrored=mirrored)
    return CodedCopy.of(CopyPlan(CropPlan(size, box), False, augment, NONE, NONE), video, whole=False)


def on_host(frames: NDArray[np.uint8], drawn: Sequence[Drawn], copy: CodedCopy) -> NDArray[np.uint8]:
    """Apply to the part of the frames that the source sends, as it does for PyAV."""
    top, left, height, width = copy.source
    part = np.ascontiguousarray(frames[:, top : top + height, left : left + width])
    codes = np.array([make_operation(*one, (1, 1))[0] for one in drawn], np.int32)
    regions = copy.regions - np.array([top, left, 0, 0], np.int32)
    return apply_operations(part, codes, copy.values, regions, pool=POOL)


def boxes(height: int = HEIGHT, width: int = WIDTH) -> st.SearchStrategy[Box]:
    def place(shares: tuple[float, float, float, float]) -> Box:
        tall, wide = 1 + int(shares[0] * (height - 1)), 1 + int(shares[1] * (width - 1))
        return int(shares[2] * (height - tall)), int(shares[3] * (width - wide)), tall, wide

    return st.tuples(*[st.floats(0, 1)] * 4).map(place)


@settings(max_examples=300, deadline=None)
@given(drawn=st.lists(OPERATION, max_size=4), box=boxes())
def test_a_region_has_the_pixels_of_the_whole_frame(drawn: list[Drawn], box: Box) -> None:
    frames = clip()
    whole = on_host(frames, drawn, planned(drawn, (0, 0, HEIGHT, WIDTH)))
    top, left, height, width = box
    part = on_host(frames, drawn, planned(drawn, box))
    np.testing.assert_array_equal(part, whole[:, top : top + height, left : left + width])


@settings(max_examples=300, deadline=None)
@given(drawn=st.lists(OPERATION, min_size=1, max_size=4))
def test_whole_frames_are_those_of_timm(drawn: list[Drawn]) -> None:
    """All pixels are equal but for a few after warps, whose matrices have other last digits in PIL."""
    frames = clip()
    ours = on_host(frames, drawn, planned(drawn, (0, 0, HEIGHT, WIDTH)))
    published = np.stack([by_timm(frame, drawn) for frame in frames])
    changed = (ours != published).any(axis=-1).mean()
    if not any(one.name in WARPS for one in drawn):
        assert changed == 0
    elif not any(one.name in STATISTICS for one in drawn):
        assert changed < 1e-3
    assert np.abs(ours.astype(int) - published).mean() < 0.05


@pytest.mark.parametrize("name", sorted(TIMM))
def test_every_operation_is_that_of_timm(name: str) -> None:
    frames = clip()
    for share, sign in ((0.71, 1.0), (0.43, -1.0), (0.99, 1.0), (0.0, 1.0)):
        drawn = [Drawn(name, share, sign)]
        published = np.stack([by_timm(frame, drawn) for frame in frames])
        ours = on_host(frames, drawn, planned(drawn, (0, 0, HEIGHT, WIDTH)))
        difference = np.abs(ours.astype(int) - published)
        assert difference.max() <= (name in WARPS)
        assert (difference > 0).mean() < 1e-4
        if share in (0.43, 0.71):
            assert np.abs(published.astype(int) - frames).mean() > 0.5, "the operation does nothing to these frames"


@settings(max_examples=150, deadline=None)
@given(
    drawn=st.lists(OPERATION, max_size=4),
    box=boxes(),
    rotation=st.sampled_from([0, 90, 180, 270]),
    mirrored=st.booleans(),
)
def test_a_video_that_is_displayed_rotated_or_mirrored(
    drawn: list[Drawn], box: Box, rotation: int, mirrored: bool
) -> None:
    """Operations act on the displayed frame, as if the video had been stored upright."""
    displayed = clip()
    coded = np.rot90(displayed, -rotation // 90, axes=(1, 2))
    if mirrored:
        coded = coded[:, :, ::-1]
    expected = on_host(displayed, drawn, planned(drawn, box))
    got = on_host(np.ascontiguousarray(coded), drawn, planned(drawn, box, rotation=rotation, mirrored=mirrored))
    upright = got.swapaxes(1, 2) if rotation % 180 else got
    video = Row(name="", path="", height=HEIGHT, width=WIDTH, rotation=rotation, mirrored=mirrored)
    mirrors = flip_axes(False, video)
    upright = upright[:, :: -1 if mirrors[1] else 1, :: -1 if mirrors[0] else 1]
    assert upright.shape == expected.shape
    # A kernel that is walked through backwards rounds differently now and then; statistics may carry this on.
    changed = (upright != expected).any(axis=-1).mean()
    assert changed < 1e-2 or any(one.name in STATISTICS for one in drawn)
    assert np.abs(upright.astype(int) - expected).mean() < 0.05


@settings(max_examples=300, deadline=None)
@given(
    place=st.sampled_from([1, 2, 3, 5]),
    amount=st.floats(-1, 1),
    size=st.sampled_from([(HEIGHT, WIDTH), (40, 60), (1, 1)]),
)
def test_shears_and_translations_are_those_of_pil_to_the_bit(place: int, amount: float, size: tuple[int, int]) -> None:
    matrix = np.array([1.0, 0, 0, 0, 1, 0])
    # Drawn matrices are multiples of 2**-36: positions are exact, in whatever order PIL adds.
    matrix[place] = round(amount * (0.5 if place in (1, 3) else 150) * 2**36) / 2**36
    frame = clip()[0]
    expected = Image.fromarray(frame).transform(
        size[::-1], Image.Transform.AFFINE, matrix.tolist(), Image.Resampling.BICUBIC, fillcolor=(128,) * 3
    )
    np.testing.assert_array_equal(warp_function(matrix, frame.shape[:2], size)(frame), np.asarray(expected))


def test_only_what_the_crop_needs_is_read() -> None:
    box = (40, 50, 30, 40)
    assert planned([Drawn("brightness", 0.5, 1), Drawn("color", 0.5, 1)], box).source == box
    assert planned([Drawn("sharpness", 0.5, 1)], box).source == (39, 49, 32, 42)
    assert planned([Drawn("equalize", 0.5, 1), Drawn("sharpness", 0.5, 1)], box).source == (0, 0, HEIGHT, WIDTH)
    shifted = planned([Drawn("translate_x", 0.5, -1)], box).source  # by 29.25 pixels, and two for the kernel
    assert shifted == (39, 50 - 30 - 1, 33, 43)
    beyond = planned([Drawn("translate_x", 1, 1)], (0, 100, 20, 20))  # 58.5 pixels: all of it comes from outside
    assert (on_host(clip(), [Drawn("translate_x", 1, 1)], beyond) == 128).all()


LARGEST = 2.0
"""Allowed mean difference in levels of a bilinear warp from a bicubic one."""


def test_dali_does_the_same_up_to_rounding_and_the_filter_of_warps() -> None:
    """DALI's operators, which a GPU uses, on the host: whole frames, and boxes at a corner and in the middle."""
    wanted = [(0, 0, HEIGHT, WIDTH), (0, 60, 70, 70), (30, 20, 40, 61)]
    cases = [
        ([Drawn(name, share, sign)], box)
        for name in sorted(TIMM)
        for share, sign in ((0.7, 1.0), (0.4, -1.0))
        for box in wanted
    ]
    for (drawn, box), host, dali in zip(cases, *by_graphs(cases), strict=True):
        assert host.shape == dali.shape == (FRAMES, *box[2:], 3)
        difference = np.abs(host.astype(int) - dali)
        (name, *_), case = drawn[0], (drawn, box)
        if name in WARPS:
            assert difference.mean() < LARGEST, case
            filled = [(picture == 128).all(axis=-1) for picture in (host, dali)]
            assert (filled[0] == filled[1]).mean() > 0.999, case
        else:
            # PIL's equalize rounds its step to a whole number of pixels: of these small frames, by one percent.
            assert difference.max() <= (4 if name == "equalize" else 1), case
            assert difference.mean() < (2 if name == "equalize" else 0.1), case


def test_dali_chains_operations_through_their_regions() -> None:
    chains = [
        [Drawn("equalize", 0.5, 1), Drawn("sharpness", 0.7, 1), Drawn("solarize", 0.4, 1), Drawn("contrast", 0.5, -1)],
        [Drawn("sharpness", 0.9, 1), Drawn("sharpness", 0.9, -1), Drawn("color", 0.7, 1), Drawn("posterize", 0.2, 1)],
        [Drawn("translate_x", 0.7, 1), Drawn("shear_y", 0.7, 1), Drawn("brightness", 0.3, -1), Drawn("rotate", 0.6, 1)],
        [Drawn("rotate", 0.7, 1), Drawn("autocontrast", 0.7, 1), Drawn("translate_y", 0.7, 1), Drawn("invert", 1, 1)],
    ]
    cases = [(chain, box) for chain in chains for box in ((0, 0, HEIGHT, WIDTH), (20, 30, 50, 60))]
    for (drawn, box), host, dali in zip(cases, *by_graphs(cases), strict=True):
        assert host.shape == dali.shape == (FRAMES, *box[2:], 3)
        warped = sum(one.name in WARPS for one in drawn)
        assert np.abs(host.astype(int) - dali).mean() < 2 * (1 + warped), (drawn, box)


def by_graphs(cases: Sequence[tuple[list[Drawn], Box]]) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """The crops by PIL in a graph, and those by DALI's operators."""
    copies = [planned(drawn, box) for drawn, box in cases]
    codes = [np.array([[make_operation(*one, (1, 1))[0] for one in drawn]], np.int32) for drawn, _ in cases]
    number = codes[0].shape[1]

    @pipeline_def(batch_size=len(cases), num_threads=1, device_id=None, enable_conditionals=True)
    def graph() -> tuple[object, object]:
        frames = fn.external_source(lambda: [clip()] * len(cases), layout="FHWC", dtype=types.UINT8, ndim=4)
        sample = {
            "operations": fn.external_source(lambda: codes, dtype=types.INT32, ndim=2),
            "values": fn.external_source(lambda: [c.values[None] for c in copies], dtype=types.FLOAT64, ndim=3),
            "regions": fn.external_source(lambda: [c.regions[None] for c in copies], dtype=types.INT32, ndim=3),
        }
        host = rand_augment_on_host(sample, frames, copy=0, pool=POOL)
        return host, rand_augment_by_dali(sample, frames, copy=0, operations=number, on_gpu=False)

    host, dali = graph().run()
    return [np.array(host.at(k)) for k in range(len(cases))], [np.array(dali.at(k)) for k in range(len(cases))]
