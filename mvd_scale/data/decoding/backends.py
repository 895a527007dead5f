"""Choice of the implementation that decodes a video: DALI on the CPU or by NVDEC, or PyAV.

DALI gets a video only where it gives the frames and colours that PyAV gives. The choice depends on the manifest, on the
capabilities of NVDEC that all ranks share, and on the kinds of videos that DALI failed to decode in this run; it is the
same on all ranks.

Workers import this module: it must not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.utils.nvdec import MACROBLOCK, Nvdec, is_whole

DaliDevice = Literal["cpu", "mixed"]
"""Device on which DALI decodes: the CPU, or NVDEC of a GPU ("mixed" in DALI's terms)."""

DALI_CODECS: dict[DaliDevice, frozenset[str]] = {
    "cpu": frozenset({"vp8", "mjpeg"}),
    "mixed": frozenset({"h264", "hevc", "vp8", "vp9", "av1"}),
}
"""Codecs that DALI 2.4 decodes; PyAV decodes the rest. On the CPU DALI decodes VP9 as well, but takes 1.4 times the
CPU time of PyAV, and the workers do not help it.

NVDEC decodes MPEG-4 part 2 as well, but DALI gives its parser no display callback (`InitGpuParser` in
`frames_decoder_gpu.cc` sets `pfnDisplayPicture` to null): each picture gets the next time of the packets. AVI has no
times, and packed B-frames have one for two pictures, so that frames would change places."""

DALI_COLOURS = frozenset({("yuv420p", "bt601"), ("yuvj420p", "bt601 full")})
"""Pixel format and colour of the streams that DALI converts to RGB as their tags say. All its decoders accept 8 bits,
4:2:0. On the CPU it ignores the tags, except that FFmpeg's format yuvj420p is of full range. Its kernel for the GPU
(`color_space.cu`) knows the matrix of BT.601 alone, with the range that the stream states."""

CORRECTED_COLOURS = frozenset({("yuv420p", "bt709"), ("yuvj420p", "bt709 full")})
"""Pixel format and colour of the streams that DALI converts on a GPU by the wrong matrix, which the graph corrects by
`BT709_FROM_BT601`. On the CPU the correction takes longer than PyAV takes to decode."""


def _rgb_matrix(red: float, blue: float) -> NDArray[np.float64]:
    """Matrix from luma and the two colour differences, each of range 1, to RGB, by the weights of red and blue."""
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


BT709_FROM_BT601 = (_rgb_matrix(0.2126, 0.0722) @ np.linalg.inv(_rgb_matrix(0.299, 0.114))).astype(np.float32)
"""Matrix from RGB that was converted by BT.601 to the RGB of BT.709 (ITU-R BT.709-6, 3.2), of either range. It holds
except for colours that were cut at black or white: on real clips the mean difference from the direct conversion is 0.24
levels of 255 (rounding), over the whole cube of RGB 0.9, and at most 37 at pure colours."""


class DecodeBackend(IntEnum):
    """Implementation that decodes a clip: PyAV or DALI."""

    PYAV = 0
    """PyAV, in a worker process."""

    DALI_VIDEO = 1
    """DALI's video decoder, in the graph."""

    DALI_IMAGE = 2
    """DALI's image decoder, in the graph."""


class VideoKind(NamedTuple):
    """Kind of videos that a decoder treats alike."""

    codec: str
    pixel_format: str
    side: int
    """Smallest power of two that is not less than the longer side of a frame in pixels."""

    @classmethod
    def of(cls, video: Row) -> VideoKind:
        """Kind of a video of the manifest."""
        return cls(video.codec, video.pixel_format, 1 << (max(video.coded_size) - 1).bit_length())

    def __str__(self) -> str:
        return f"{self.codec}, {self.pixel_format}, up to {self.side} pixels"


class CodedSize(NamedTuple):
    """Codec, height and width of coded frames, by which DALI looks for an NVDEC decoder that it can use again."""

    codec: str
    height: int
    width: int

    @classmethod
    def of(cls, video: Row) -> CodedSize:
        """Coded size of a video: whole blocks, of which the displayed frame may show a part."""
        height, width = video.coded_size
        # H.264 and VP8 code macroblocks; the smallest blocks of HEVC, VP9 and AV1 have 8 pixels.
        block = MACROBLOCK if video.codec in ("h264", "vp8") else MACROBLOCK // 2
        return cls(video.codec, -(-height // block) * block, -(-width // block) * block)


@dataclass(frozen=True)
class Decoders:
    """Decoders of a run, and the rules by which each video gets one of them. Picklable."""

    videos: DaliDevice = "cpu"
    """Device of DALI's video decoder."""

    images: DaliDevice = "cpu"
    """Device of DALI's image decoder."""

    nvdec: Nvdec | None = None
    """Capabilities of NVDEC; None for a GPU that decodes everything, about which nobody was asked."""

    shared_sizes: frozenset[CodedSize] = frozenset()
    """Coded sizes of videos that are displayed whole, for NVDEC: see `find_shared_sizes`."""

    by_pyav: frozenset[VideoKind] = frozenset()
    """Kinds of videos that PyAV decodes because DALI failed to."""

    def refusal(self, video: Row) -> str:
        """Reason why DALI does not decode a video; empty if it does."""
        if video.still:
            return ""
        if not video.plain:
            return "its packets are not its frames"
        if video.codec not in DALI_CODECS[self.videos]:
            return "DALI does not decode it"
        on_gpu, colours = self.videos == "mixed", (video.pixel_format, video.colour)
        if colours not in DALI_COLOURS and not (on_gpu and colours in CORRECTED_COLOURS):
            return f"DALI does not convert {video.pixel_format} in {video.colour}"
        return (self._refusal_of_nvdec(video) if on_gpu else "") or (
            "DALI failed to decode this kind before" if VideoKind.of(video) in self.by_pyav else ""
        )

    def _refusal_of_nvdec(self, video: Row) -> str:
        height, width = video.coded_size
        if height % 2 or width % 2:
            # NVDEC pads to even rows, and DALI looks for chroma right behind the last displayed row.
            return "NVDEC gives frames of even sides"
        if self.nvdec is not None and (reason := self.nvdec.refusal(video.codec, video.pixel_format, (height, width))):
            return reason
        size = CodedSize.of(video)
        if size.height != height and size in self.shared_sizes:
            return f"DALI confuses its size with {size.width}x{size.height}"
        return ""

    def corrects(self, video: Row) -> bool:
        """Whether the graph corrects the colours of a video that DALI decodes."""
        return (video.pixel_format, video.colour) in CORRECTED_COLOURS


def find_shared_sizes(manifest: Manifest) -> frozenset[CodedSize]:
    """Coded sizes of usable videos that are displayed whole.

    DALI keeps NVDEC decoders for further videos. It looks for one by the size that is coded and files it by the size
    that is displayed (`NVDECCache` in `frames_decoder_gpu.cc`). So a decoder that was made for 1920x1088 pixels is also
    taken for 1920x1080, which is coded as 1088 rows: its chroma lies behind row 1088, and DALI reads it behind row
    1080. PyAV decodes such videos where the manifest has both sizes.
    """
    sizes = {(kind.codec, kind.height, kind.width) for kind in manifest.kinds}
    videos = (Row("", "", codec=codec, height=height, width=width) for codec, height, width in sizes)
    return frozenset(size for size in map(CodedSize.of, videos) if tuple(size) in sizes)


def count_unaligned(manifest: Manifest) -> int:
    """Count the usable videos, without still images, whose frames do not consist of whole macroblocks."""
    return sum(count for kind, count in count_kinds(manifest) if not kind.still and not is_whole(*kind.coded_size))


def decode_backend(video: Row, decoders: Decoders) -> DecodeBackend:
    """Choose the implementation that decodes a video: DALI only where it gives the same frames and colours as PyAV."""
    if video.still:
        return DecodeBackend.DALI_IMAGE
    return DecodeBackend.PYAV if decoders.refusal(video) else DecodeBackend.DALI_VIDEO


def count_kinds(manifest: Manifest) -> Iterator[tuple[Row, int]]:
    """Yield a row for each kind of usable videos that `decode_backend` tells apart, and the number of its videos."""
    for kind, count in manifest.kinds.items():
        yield Row("", "", **kind._asdict()), count


def count_backends(manifest: Manifest, decoders: Decoders) -> Counter[DecodeBackend]:
    """Count the usable videos by the implementation that decodes them."""
    counts: Counter[DecodeBackend] = Counter()
    for video, count in count_kinds(manifest):
        counts[decode_backend(video, decoders)] += count
    return counts


def count_refusals(manifest: Manifest, decoders: Decoders) -> Counter[str]:
    """Count the usable videos that DALI does not decode, by codec and reason."""
    counts: Counter[str] = Counter()
    for video, count in count_kinds(manifest):
        if reason := decoders.refusal(video):
            counts[f"{video.codec} ({reason})"] += count
    return counts


def decode_backends(manifest: Manifest, decoders: Decoders) -> list[DecodeBackend]:
    """List the implementations that the usable videos need, and PyAV for videos that DALI fails to decode."""
    return sorted({*count_backends(manifest, decoders), DecodeBackend.PYAV})
