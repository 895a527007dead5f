"""Tests of the choice of a decoder for each video: what NVDEC takes, sizes that DALI confuses, failed kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mvd_scale.data.decoding.backends import (
    CodedSize,
    DecodeBackend,
    Decoders,
    VideoKind,
    count_backends,
    count_refusals,
    count_unaligned,
    decode_backend,
    decode_backends,
    find_shared_sizes,
)
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.utils.nvdec import Nvdec, NvdecFormat

VIDEO = Row("a.mp4", "/a.mp4", codec="h264", pixel_format="yuv420p", height=240, width=320)
H100 = Nvdec(
    (
        NvdecFormat("h264", "4:2:0", 8, 48, 16, 4096, 4096, 65536),
        NvdecFormat("hevc", "4:2:0", 8, 144, 144, 8192, 8192, 262144),
        NvdecFormat("vp9", "4:2:0", 8, 128, 128, 8192, 8192, 262144),
    )
)
ON_H100 = Decoders("mixed", "mixed", H100)


def backend(decoders: Decoders = ON_H100, **changes: object) -> DecodeBackend:
    return decode_backend(replace(VIDEO, **changes), decoders)


def manifest(*changes: dict[str, object]) -> Manifest:
    return Manifest.from_rows([replace(VIDEO, name=f"{k}", **change) for k, change in enumerate(changes)])


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "av1"},
        {"height": 4320, "width": 7680},
        {"codec": "hevc", "height": 128, "width": 128},
        {"codec": "mpeg4"},
        {"codec": "mjpeg", "pixel_format": "yuvj420p", "colour": "bt601 full"},
        {"pixel_format": "yuv420p10le"},
        {"pixel_format": "yuv444p"},
        {"colour": "bt2020"},
        {"colour": "bt601 full"},
        {"plain": False},
        {"height": 241},
        {"width": 321},
    ],
    ids=str,
)
def test_what_nvdec_does_not_take_goes_to_pyav_from_the_first_clip_on(changes: dict[str, object]) -> None:
    assert backend() is DecodeBackend.DALI_VIDEO
    assert backend(**changes) is DecodeBackend.PYAV
    assert decode_backends(manifest(changes), ON_H100) == [DecodeBackend.PYAV]


def test_another_gpu_takes_more() -> None:
    ada = replace(H100, formats=(*H100.formats, NvdecFormat("av1", "4:2:0", 8, 128, 128, 8192, 8192, 262144)))
    assert backend(Decoders("mixed", "mixed", ada), codec="av1") is DecodeBackend.DALI_VIDEO
    assert backend(Decoders("mixed", "mixed"), codec="av1") is DecodeBackend.DALI_VIDEO


def test_rotated_videos_are_asked_for_by_their_coded_size() -> None:
    wide = Nvdec((NvdecFormat("h264", "4:2:0", 8, 48, 16, 512, 256, 65536),))
    standing = {"height": 320, "width": 240, "rotation": 90}
    assert backend(Decoders("mixed", "mixed", wide), **standing) is DecodeBackend.DALI_VIDEO
    assert backend(Decoders("mixed", "mixed", wide), **(standing | {"rotation": 0})) is DecodeBackend.PYAV


def test_a_driver_without_nvdec_leaves_everything_to_pyav() -> None:
    none = Decoders("mixed", "mixed", Nvdec(missing="no library"))
    assert backend(none) is DecodeBackend.PYAV
    assert backend(none, still=True, codec="jpeg") is DecodeBackend.DALI_IMAGE


def test_on_the_host_dali_decodes_what_it_decodes_on_cpus() -> None:
    host = Decoders()
    assert backend(host) is DecodeBackend.PYAV
    assert backend(host, codec="vp9") is DecodeBackend.PYAV
    assert backend(host, codec="vp8") is DecodeBackend.DALI_VIDEO
    assert backend(host, codec="vp8", width=321) is DecodeBackend.DALI_VIDEO
    assert backend(host, codec="vp8", colour="bt709") is DecodeBackend.PYAV


def test_heights_of_one_coded_size_are_not_mixed() -> None:
    both = manifest({"height": 1088, "width": 1920}, {"height": 1080, "width": 1920}, {"height": 1072, "width": 1920})
    decoders = replace(ON_H100, shared_sizes=find_shared_sizes(both))
    assert CodedSize.of(both.row(1)) == ("h264", 1088, 1920)
    assert CodedSize.of(replace(both.row(1), codec="hevc")) == ("hevc", 1080, 1920)
    assert [decode_backend(row, decoders) for row in both.rows] == [
        DecodeBackend.DALI_VIDEO, DecodeBackend.PYAV, DecodeBackend.DALI_VIDEO,
    ]  # fmt: skip
    # Of another codec or width, or without the size of whole blocks, nothing is confused.
    apart = manifest(
        {"height": 1088, "codec": "hevc", "width": 1920}, {"height": 1080, "width": 1920}, {"height": 1088}
    )
    decoders = replace(ON_H100, shared_sizes=find_shared_sizes(apart))
    assert [decode_backend(row, decoders) for row in apart.rows] == [DecodeBackend.DALI_VIDEO] * 3


def test_a_kind_that_failed_goes_to_pyav() -> None:
    kind = VideoKind.of(VIDEO)
    assert kind == ("h264", "yuv420p", 512)
    decoders = replace(ON_H100, by_pyav=frozenset({kind}))
    assert backend(decoders) is backend(decoders, height=512, width=340) is DecodeBackend.PYAV
    assert backend(decoders, width=640) is backend(decoders, codec="vp9") is DecodeBackend.DALI_VIDEO


def test_refusals_are_counted_by_codec_and_reason() -> None:
    rows = manifest({}, {}, {"codec": "av1"}, {"codec": "av1"}, {"codec": "mpeg4"}, {"still": True, "codec": "jpeg"})
    assert count_refusals(rows, ON_H100) == {
        "av1 (NVDEC of this GPU has no av1 of pixel format yuv420p)": 2,
        "mpeg4 (DALI does not decode it)": 1,
    }
    assert count_backends(rows, ON_H100) == {
        DecodeBackend.DALI_VIDEO: 2, DecodeBackend.PYAV: 3, DecodeBackend.DALI_IMAGE: 1,
    }  # fmt: skip


def test_sizes_of_which_every_clip_gets_a_decoder_are_counted() -> None:
    rows = manifest({}, {"width": 340}, {"height": 1080, "width": 1920}, {"width": 340, "still": True, "codec": "jpeg"})
    assert count_unaligned(rows) == 2
