"""Tests of `data.decoder`: NVDEC, the host, what is said of each, and errors."""

from __future__ import annotations

import logging

import pytest
import torch

from mvd_scale.data.decoding.backends import Decoders
from mvd_scale.data.loaders import decoder_choice
from mvd_scale.data.loaders.decoder_choice import choose_decoders
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError
from mvd_scale.utils.nvdec import Nvdec, NvdecFormat

H264 = Nvdec((NvdecFormat("h264", "4:2:0", 8, 48, 16, 4096, 4096, 65536),))
MISSING = Nvdec(missing="the driver's video library is missing")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VIDEOS = Manifest.from_rows(
    [
        Row(f"{k}", f"/{k}", codec=codec, pixel_format="yuv420p", height=240, width=width)
        for k, (codec, width) in enumerate([("h264", 320), ("h264", 320), ("av1", 320), ("h264", 8192), ("mpeg4", 320)])
    ]
)


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    decoder_choice._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "mvd_scale")
    return caplog.messages


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_what_nvdec_does_not_take_is_said_once_with_counts(caplog: pytest.LogCaptureFixture) -> None:
    rank = DataRank(CUDA, shared_nvdec=H264)
    for _ in range(2):
        decoders = choose_decoders(VIDEOS, "auto", rank)
    assert (decoders.videos, decoders.images, decoders.nvdec) == ("mixed", "mixed", H264)
    (said,) = messages(caplog)
    assert said.startswith("PyAV decodes 3 of 5 videos on the CPUs, not NVDEC: ")
    assert "1 av1 (NVDEC of this GPU has no av1 of pixel format yuv420p)" in said
    assert "1 h264 (NVDEC decodes h264 up to 4096x4096 pixels, not 8192x240)" in said
    assert "1 mpeg4 (DALI does not decode it)" in said


def test_nothing_is_said_where_nvdec_takes_all(caplog: pytest.LogCaptureFixture) -> None:
    choose_decoders(VIDEOS.take(VIDEOS.usable[:2]), "nvdec", DataRank(CUDA, shared_nvdec=H264))
    choose_decoders(VIDEOS, "auto", DataRank(CPU))
    choose_decoders(VIDEOS, "host", DataRank(CUDA, shared_nvdec=H264))
    assert messages(caplog) == []


def test_without_nvdec_videos_are_decoded_on_the_host(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_decoders(VIDEOS, "auto", DataRank(CUDA, shared_nvdec=MISSING)) == Decoders(images="mixed")
    assert messages(caplog) == [
        "videos are decoded on the CPUs, because data.decoder is auto and there is no NVDEC: the driver's video "
        "library is missing"
    ]


def test_the_host_may_be_chosen_beside_a_gpu() -> None:
    # The driver is not even asked: this device does not exist here.
    assert choose_decoders(VIDEOS, "host", DataRank(CUDA)) == Decoders()


@pytest.mark.parametrize(
    ("rank", "reason"),
    [(DataRank(CPU), "the device is a CPU"), (DataRank(CUDA, shared_nvdec=MISSING), MISSING.missing)],
)
def test_nvdec_is_an_error_where_there_is_none(rank: DataRank, reason: str) -> None:
    with pytest.raises(UserError, match=f"data.decoder is nvdec, but there is no NVDEC: {reason}. Set data.decoder"):
        choose_decoders(VIDEOS, "nvdec", rank)
