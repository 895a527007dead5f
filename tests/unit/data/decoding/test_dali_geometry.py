"""Tests of crop, resize, rotation and flip: the CPU and GPU implementations agree with each other and with PIL."""

import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from mvd_scale.data.decoding.dali_geometry import Cut, Resampling, resample, resize, upright

RNG = np.random.default_rng(0)
SMOOTH = np.array(
    Image.fromarray(RNG.integers(0, 256, (2 * 12, 20, 3), dtype=np.uint8)).resize(
        (100, 2 * 60), Image.Resampling.BICUBIC
    )
).reshape(2, 60, 100, 3)
"""Two smooth frames: at sharp edges, small differences in rounding would become large."""

STILL = (np.zeros(2, np.int32), np.zeros((), np.int32))


def run(
    on_gpu: bool,
    anchor: list[int],
    shape: list[int],
    mirror: list[int],
    transpose: int,
    *,
    cut: Cut | None,
    how: Resampling,
    size: tuple[int, int] = (32, 48),
) -> NDArray:
    """`upright` of these frames; DALI's operators take frames on the host too."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, enable_conditionals=True)
    def graph() -> object:
        frames = fn.external_source(lambda: [SMOOTH], dtype=types.UINT8, ndim=4, layout="FHWC")
        sample = {
            "anchor": types.Constant(np.array([anchor], np.int32)),
            "shape": types.Constant(np.array([shape], np.int32)),
            "mirror": types.Constant(np.array([mirror], np.int32)),
            "transpose": fn.external_source(lambda: [np.array(transpose, np.int32)], dtype=types.INT32, ndim=0),
        }
        return upright(sample, frames, size, how, copy=0, cut=cut, turned=True, on_gpu=on_gpu)

    (clips,) = graph().run()
    return np.array(clips.at(0)).astype(int)


def assert_close(host: NDArray, dali: NDArray) -> None:
    """Check the two implementations within a few levels: DALI's antialiasing differs from PIL's and torch's."""
    differences = np.abs(host - dali)
    assert differences.max() <= 6
    assert differences.mean() < 0.4


@pytest.mark.parametrize("transpose", [0, 1])
@pytest.mark.parametrize("mirror", [[0, 0], [1, 0], [0, 1], [1, 1]])
@pytest.mark.parametrize(("filter", "antialias"), [("bilinear", True), ("bilinear", False), ("bicubic", True)])
def test_torch_and_dali_give_the_same_pixels(filter: str, antialias: bool, mirror: list[int], transpose: int) -> None:
    where = ([5, 7], [50, 80], mirror, transpose)
    how = Resampling(filter, antialias)  # type: ignore[arg-type]
    host, dali = (run(on_gpu, *where, cut="first", how=how) for on_gpu in (False, True))
    assert host.shape == dali.shape == (2, *((48, 32) if transpose else (32, 48)), 3)
    assert_close(host, dali)


def test_whole_frames_where_nothing_is_cut() -> None:
    how = Resampling("bilinear", antialias=True)
    whole = run(False, [5, 7], [50, 80], [0, 0], 0, cut=None, how=how)
    np.testing.assert_array_equal(whole, run(False, [0, 0], [60, 100], [0, 0], 0, cut="first", how=how))
    assert_close(whole, run(True, [5, 7], [50, 80], [0, 0], 0, cut=None, how=how))


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("transpose", [0, 1])
def test_a_crop_of_resized_frames_is_cut_last(on_gpu: bool, transpose: int) -> None:
    how = Resampling("bilinear", antialias=False)
    whole = run(on_gpu, [0, 0], [1, 1], [0, 0], transpose, cut=None, how=how, size=(40, 66))
    turned = whole.swapaxes(1, 2) if transpose else whole
    cut = run(on_gpu, [3, 20], [32, 40], [1, 0], transpose, cut="last", how=how, size=(40, 66))
    expected = turned[:, 3:35, 20:60]
    expected = (expected.swapaxes(1, 2) if transpose else expected)[:, :, ::-1]
    np.testing.assert_array_equal(cut, expected)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_resizing_is_that_of_pil(filter: str) -> None:
    resampling = Image.Resampling.BILINEAR if filter == "bilinear" else Image.Resampling.BICUBIC
    ours = resample(SMOOTH, np.array([30, 70], np.float32), *STILL, filter=filter, antialias=True)  # type: ignore[arg-type]
    for frame, expected in zip(ours, SMOOTH, strict=True):
        picture = np.asarray(Image.fromarray(expected).resize((70, 30), resampling))
        assert np.abs(frame.astype(int) - picture).max() <= 1


def test_frames_already_of_that_size_stay_as_they_are() -> None:
    same = resample(SMOOTH, np.array([60, 100], np.float32), *STILL, filter="bicubic", antialias=True)
    np.testing.assert_array_equal(same, SMOOTH)


def test_a_box_that_reaches_out_of_the_frames_is_an_error() -> None:
    box = np.array([30, 0], np.int32), np.array([31, 10], np.int32)
    with pytest.raises(ValueError, match="60 x 100 pixels do not contain the box"):
        resample(SMOOTH, np.array([8, 8], np.float32), *STILL, *box, filter="bilinear", antialias=True)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_second_side_is_made_from_the_first(on_gpu: bool, antialias: bool) -> None:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph() -> object:
        clip = fn.external_source(lambda: [SMOOTH], dtype=types.UINT8, ndim=4, layout="FHWC")
        return resize(clip, (24, 24), Resampling("bilinear", antialias), on_gpu=on_gpu)

    (clips,) = graph().run()
    expected = resample(SMOOTH, np.array([24, 24], np.float32), *STILL, filter="bilinear", antialias=antialias)
    assert_close(np.array(clips.at(0)).astype(int), expected.astype(int))
