"""Tests of the question to the driver about NVDEC, against a stub that reads and writes the structure as bytes."""

from __future__ import annotations

import ctypes
import json
import struct
from dataclasses import replace

import pytest
import torch

from mvd_scale.utils import nvdec
from mvd_scale.utils.nvdec import DecoderCaps, Nvdec, NvdecFormat, query_nvdec, read_capabilities, shared_nvdec

# By dynlink_cuviddec.h: numbers of codecs and chroma formats, bits less 8; then least and largest sides, macroblocks.
HOPPER = {
    (4, 1, 0): (48, 16, 4096, 4096, 65536),  # H.264
    (8, 1, 0): (144, 144, 8192, 8192, 262144),  # HEVC
    (8, 1, 2): (144, 144, 8192, 8192, 262144),
    (9, 1, 0): (48, 16, 4096, 4096, 65536),  # VP8
    (10, 1, 0): (128, 128, 8192, 8192, 262144),  # VP9
}
ADA = HOPPER | {(11, 1, 0): (128, 128, 8192, 8192, 262144)}  # AV1
HEAD = struct.Struct("@iiI3I")
ANSWER = struct.Struct("@BBHIIIHHBBH10I")


class Driver:
    """Stub of `cuvidGetDecoderCaps`, called through C."""

    def __init__(self, table: dict[tuple[int, int, int], tuple[int, ...]], error: int = 0) -> None:
        self.table = table
        self.error = error
        self.calls = 0
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_ubyte))
        self.function = prototype(self.answer)

    def answer(self, pointer: ctypes._Pointer[ctypes.c_ubyte]) -> int:
        self.calls += 1
        buffer = (ctypes.c_ubyte * 88).from_address(ctypes.addressof(pointer.contents))
        codec, chroma, depth, *reserved = HEAD.unpack_from(buffer, 0)
        assert reserved == [0, 0, 0]
        limits = self.table.get((codec, chroma, depth))
        if limits is not None:
            min_width, min_height, max_width, max_height, blocks = limits
            sizes = (max_width, max_height, blocks, min_width, min_height)
            ANSWER.pack_into(buffer, HEAD.size, 1, 7, 1, *sizes, 1, 32, 256, *[0] * 10)
        return self.error

    def __call__(self, reference: object) -> int:
        return int(self.function(ctypes.cast(reference, ctypes.POINTER(ctypes.c_ubyte))))


def capabilities(table: dict[tuple[int, int, int], tuple[int, ...]]) -> Nvdec:
    return read_capabilities(Driver(table))


def test_the_structure_is_the_drivers() -> None:
    assert ctypes.sizeof(DecoderCaps) == HEAD.size + ANSWER.size == 88
    assert (DecoderCaps.supported.offset, DecoderCaps.max_width.offset, DecoderCaps.min_width.offset) == (24, 28, 40)


def test_every_codec_is_asked_for_and_its_limits_are_read() -> None:
    driver = Driver(HOPPER)
    found = read_capabilities(driver)
    assert driver.calls == 5 * 3 * 3
    assert [(kind.codec, kind.depth) for kind in found.formats] == [
        ("h264", 8), ("hevc", 8), ("hevc", 10), ("vp8", 8), ("vp9", 8),
    ]  # fmt: skip
    assert found.formats[0] == NvdecFormat("h264", "4:2:0", 8, 48, 16, 4096, 4096, 65536)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (("h264", "yuv420p", (1080, 1920)), ""),
        (("h264", "yuvj420p", (4096, 4096)), ""),
        (("h264", "yuv420p", (2160, 4098)), "NVDEC decodes h264 up to 4096x4096 pixels, not 4098x2160"),
        (("h264", "yuv420p", (14, 64)), "NVDEC decodes h264 from 48x16 pixels on, not 64x14"),
        (("h264", "yuv420p10le", (64, 64)), "NVDEC of this GPU has no h264 of pixel format yuv420p10le"),
        (("hevc", "yuv420p10le", (256, 256)), ""),
        (("hevc", "gbrp", (256, 256)), "NVDEC of this GPU has no hevc of pixel format gbrp"),
        (("av1", "yuv420p", (720, 1280)), "NVDEC of this GPU has no av1 of pixel format yuv420p"),
    ],
)
def test_a_video_is_taken_or_refused_with_the_reason(video: tuple[str, str, tuple[int, int]], reason: str) -> None:
    assert capabilities(HOPPER).refusal(*video) == reason


def test_the_number_of_macroblocks_is_a_limit_of_its_own() -> None:
    few = capabilities({(4, 1, 0): (48, 16, 4096, 4096, 8160)})
    assert few.refusal("h264", "yuv420p", (1080, 1920)) == ""
    assert few.refusal("h264", "yuv420p", (1920, 1100)) != ""


def test_a_driver_that_fails_and_a_gpu_without_nvdec_are_reasons() -> None:
    assert "cuvidGetDecoderCaps returns 201" in read_capabilities(Driver(HOPPER, error=201)).missing
    assert capabilities({}).missing == "the GPU has no NVDEC"
    assert capabilities({}).refusal("h264", "yuv420p", (64, 64)) == "the GPU has no NVDEC"
    assert query_nvdec(torch.device("cpu")).missing == "the device is a CPU"


def test_the_library_that_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvdec, "LIBRARY", "libnvcuvid.so.none")
    assert "libnvcuvid.so.none" in nvdec._query_gpu.__wrapped__(0).missing
    monkeypatch.setattr(nvdec, "LIBRARY", "libc.so.6")  # a library without the function
    assert "cuvidGetDecoderCaps" in nvdec._query_gpu.__wrapped__(0).missing


def test_ranks_of_different_gpus_agree_on_what_all_of_them_decode() -> None:
    hopper, ada = capabilities(HOPPER), capabilities(ADA)
    small = replace(hopper.formats[0], min_width=64, max_height=2048)
    mixed = shared_nvdec([ada, replace(hopper, formats=(small, *hopper.formats[1:]))])
    assert {kind.codec for kind in mixed.formats} == {"h264", "hevc", "vp8", "vp9"}
    assert mixed.formats[0] == NvdecFormat("h264", "4:2:0", 8, 64, 16, 4096, 2048, 65536)
    assert shared_nvdec([ada, ada]) == ada
    assert shared_nvdec([ada, Nvdec(missing="the library is gone")]).missing == "rank 1: the library is gone"


def test_capabilities_come_back_from_the_messages_of_ranks() -> None:
    for part in (capabilities(ADA), Nvdec(missing="the library is gone")):
        text = json.dumps(part.to_json())
        assert Nvdec.from_json(json.loads(text)) == part
        assert len(text) < 1000
