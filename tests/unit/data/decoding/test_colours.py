"""Colours of DALI's decoders, with the graph's correction, against those of PyAV, on files tagged in every way.

DALI's kernel for the GPU is imitated here by its formula (`color_space_conversion_impl.h`): BT.601 of the range that
the stream states, in 8 bits.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from mvd_scale.data.decoding.backends import BT709_FROM_BT601, DecodeBackend, Decoders, decode_backend
from mvd_scale.data.decoding.dali_graph import convert_colours, decode_video
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.indexing.media_probe import probe_video
from mvd_scale.data.manifest import Row

Frame = NDArray[np.uint8]

ON_GPU = Decoders("mixed", "mixed")

LEVELS = 1.5
"""Largest mean difference of a frame, in levels of 0 to 255: FFmpeg rounds down, so that its limited range is 1.15
levels darker than the formula, with and without the correction. Without it, BT.709 differs by more than 6."""

TAGS = {
    "untagged": {},
    "601": {"colorspace": 6},
    "601, full range": {"colorspace": 6, "color_range": 2},
    "709": {"colorspace": 1},
    "709, full range": {"colorspace": 1, "color_range": 2},
}


def picture() -> Frame:
    """Smooth colours of every hue, without those at the corners of RGB that a wrong matrix cuts off."""
    rows, columns = np.mgrid[0:64, 0:64] / 63
    channels = np.stack([rows, columns, 1 - (rows + columns) / 2], -1)
    return np.asarray(30 + 190 * channels, dtype=np.uint8)


def write(path: Path, codec: str = "libx264", **tags: int) -> Row:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=25, options={"crf": "4", "b": "4M"} if codec == "libvpx" else {"crf": "1"}
        )
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p" if tags.get("color_range") == 2 and codec == "libx264" else "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        matrix = "ITU709" if tags.get("colorspace") == 1 else "ITU601"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(picture(), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix)))
        container.mux(stream.encode())
    return probe_video(Row("a", str(path)), timeout=30)


def by_dalis_kernel(video: Row) -> Frame:
    """The first frame, converted as DALI's kernel does on a GPU."""
    with av.open(video.path) as container:
        frame = next(container.decode(video=0))
    planes = [np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size) for plane in frame.planes]
    luma = planes[0][:, : frame.width].astype(np.float64)
    blue, red = (plane[:, : frame.width // 2].repeat(2, 0).repeat(2, 1) - 128.0 for plane in planes[1:])
    if video.colour.endswith("full"):
        channels = [luma + 1.402 * red, luma - 0.344136285 * blue - 0.714136285 * red, luma + 1.772 * blue]
    else:
        luma = (luma - 16) * 255 / 219
        channels = [
            luma + 1.5960267848 * red, luma - 0.39176228842 * blue - 0.81296764538 * red, luma + 2.0172321417 * blue,
        ]  # fmt: skip
    return np.stack(channels, -1).round().clip(0, 255).astype(np.uint8)


def corrected(frame: Frame, matrix: NDArray[np.float32]) -> Frame:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def graph() -> object:
        data = fn.external_source(lambda: [frame[None]], layout="FHWC", dtype=types.UINT8, ndim=4)
        return convert_colours(data, fn.external_source(lambda: [matrix], dtype=types.FLOAT, ndim=2))

    (clips,) = graph().run()
    assert clips.layout() == "FHWC"
    result: Frame = np.asarray(clips.at(0))[0]
    return result


def difference(ours: Frame, theirs: Frame) -> float:
    return float(np.abs(ours.astype(np.int16) - theirs).mean())


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
def test_a_gpu_gives_the_colours_of_the_streams_tags(tmp_path: Path, tags: dict[str, int]) -> None:
    video = write(tmp_path / "a.mp4", **tags)
    assert decode_backend(video, ON_GPU) is DecodeBackend.DALI_VIDEO
    wanted = decode_frames(video, np.array([0]))[0]
    assert difference(wanted, picture()) < 3  # the test's own file is right
    given = by_dalis_kernel(video)
    if ON_GPU.corrects(video):
        assert difference(given, wanted) > 4 * LEVELS
        given = corrected(given, BT709_FROM_BT601)
    assert difference(given, wanted) < LEVELS


def test_the_matrix_of_other_videos_changes_nothing() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (corrected(frame, np.eye(3, dtype=np.float32)) == frame).all()


def test_colours_that_were_cut_lose_little() -> None:
    """Over the whole cube of RGB in BT.709, converted by BT.601 and corrected: 0.9 levels on average, at most 37."""
    levels = np.arange(0, 256, 15)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    # From exact BT.709 to what BT.601 makes of the same luma and chroma is the inverse of the correction.
    cut = (cube @ np.linalg.inv(BT709_FROM_BT601).T).round().clip(0, 255).astype(np.uint8)
    restored = corrected(cut[None], BT709_FROM_BT601)[0].astype(int)
    assert np.abs(cut - cube).mean() > 7
    assert np.abs(restored - cube).mean() < 1.5
    assert np.abs(restored - cube).max() <= 38


@pytest.mark.parametrize("tags", [{}, {"colorspace": 6}], ids=["untagged", "601"])
def test_dali_on_the_cpu_gives_the_colours_of_the_streams_tags(tmp_path: Path, tags: dict[str, int]) -> None:
    video = write(tmp_path / "a.webm", "libvpx", **tags)
    assert decode_backend(video, Decoders()) is DecodeBackend.DALI_VIDEO
    encoded = np.fromfile(video.path, np.uint8)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def graph() -> object:
        return decode_video(fn.external_source(lambda: [encoded], dtype=types.UINT8, ndim=1), [0], "cpu")

    (clips,) = graph().run()
    assert difference(np.asarray(clips.at(0))[0], decode_frames(video, np.array([0]))[0]) < 2


def test_pyav_decodes_the_full_range_on_the_cpu(tmp_path: Path) -> None:
    video = write(tmp_path / "a.webm", "libvpx", color_range=2)
    assert decode_backend(video, Decoders()) is DecodeBackend.PYAV
