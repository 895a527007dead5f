"""Capabilities of NVDEC, the video decoder of NVIDIA's GPUs, as the driver states them.

GPUs differ: Turing, A100, H100 and H200 have no AV1, for example. The driver's library `libnvcuvid` answers for a
codec, a chroma format and a bit depth (`cuvidGetDecoderCaps` of NVIDIA's Video Codec SDK); its structure is that of
`dynlink_cuviddec.h` in FFmpeg/nv-codec-headers 13.0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

LIBRARY = "libnvcuvid.so.1"
"""Library of the driver that controls NVDEC."""

CODECS = {"h264": 4, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}
"""Number of each codec in `cudaVideoCodec`, by FFmpeg's name."""

CHROMA_FORMATS = {"4:2:0": 1, "4:2:2": 2, "4:4:4": 3}
"""Number of each chroma format in `cudaVideoChromaFormat`."""

BIT_DEPTHS = (8, 10, 12)
"""Bits of a sample that streams have."""

PIXEL_FORMATS = {"yuv420p": ("4:2:0", 8), "yuvj420p": ("4:2:0", 8), "nv12": ("4:2:0", 8)} | {
    f"yuv{chroma.replace(':', '')}p{suffix}": (chroma, depth)
    for chroma in CHROMA_FORMATS
    for suffix, depth in (("", 8), ("10le", 10), ("12le", 12))
}
"""Chroma format and bit depth by FFmpeg's name of the pixel format."""

MACROBLOCK = 16
"""Side of a macroblock in pixels; the driver limits their number."""


def is_whole(height: int, width: int) -> bool:
    """Whether a frame consists of whole macroblocks, so that DALI uses an NVDEC decoder for several videos."""
    return height % MACROBLOCK == 0 and width % MACROBLOCK == 0


class DecoderCaps(ctypes.Structure):
    """`CUVIDDECODECAPS`: a question in the first three fields, and the driver's answer."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma_format", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("histogram_supported", ctypes.c_ubyte),
        ("counter_bit_depth", ctypes.c_ubyte),
        ("max_histogram_bins", ctypes.c_ushort),
        ("reserved3", ctypes.c_uint * 10),
    )


GetDecoderCaps = Callable[[Any], int]
"""`cuvidGetDecoderCaps`: fills the answer into a reference to `DecoderCaps` and returns 0, or an error of CUDA."""


@dataclass(frozen=True)
class NvdecFormat:
    """A kind of streams that NVDEC decodes, and its limits in pixels of the coded frame."""

    codec: str
    """FFmpeg's name of the codec."""

    chroma: str
    """Chroma format, such as 4:2:0."""

    depth: int
    """Bits of a sample."""

    min_width: int
    min_height: int
    max_width: int
    max_height: int

    max_macroblocks: int
    """Largest number of macroblocks of 16 x 16 pixels in a frame."""

    def shared_with(self, other: NvdecFormat) -> NvdecFormat:
        """Return the same kind with the limits that hold on both of two GPUs."""
        return NvdecFormat(
            self.codec,
            self.chroma,
            self.depth,
            max(self.min_width, other.min_width),
            max(self.min_height, other.min_height),
            min(self.max_width, other.max_width),
            min(self.max_height, other.max_height),
            min(self.max_macroblocks, other.max_macroblocks),
        )


@dataclass(frozen=True)
class Nvdec:
    """Capabilities of NVDEC. Picklable; importing this module does not import torch."""

    formats: tuple[NvdecFormat, ...] = ()
    """All kinds of streams that it decodes."""

    missing: str = ""
    """Reason why there is no NVDEC; empty if there is one."""

    def to_json(self) -> Any:
        """Convert to short values that JSON can hold."""
        return astuple(self)

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Convert the values of `to_json` back."""
        formats, missing = values
        return cls(tuple(NvdecFormat(*kind) for kind in formats), missing)

    def refusal(self, codec: str, pixel_format: str, size: tuple[int, int]) -> str:
        """Reason why NVDEC does not decode a video; empty if it does.

        Args:
            codec: FFmpeg's name of the codec.
            pixel_format: FFmpeg's name of the pixel format.
            size: height and width in pixels of a decoded frame. The coded frame may be larger by part of a macroblock,
                which counts towards the upper limits, but not towards the lower ones.
        """
        if self.missing:
            return self.missing
        chroma, depth = PIXEL_FORMATS.get(pixel_format, (pixel_format, 0))
        found = [kind for kind in self.formats if (kind.codec, kind.chroma, kind.depth) == (codec, chroma, depth)]
        if not found:
            return f"NVDEC of this GPU has no {codec} of pixel format {pixel_format}"
        (kind,), (height, width) = found, size
        if height < kind.min_height or width < kind.min_width:
            return f"NVDEC decodes {codec} from {kind.min_width}x{kind.min_height} pixels on, not {width}x{height}"
        rows, columns = (-(-side // MACROBLOCK) for side in size)
        if rows * MACROBLOCK > kind.max_height or columns * MACROBLOCK > kind.max_width:
            return f"NVDEC decodes {codec} up to {kind.max_width}x{kind.max_height} pixels, not {width}x{height}"
        if rows * columns > kind.max_macroblocks:
            limit = kind.max_macroblocks * MACROBLOCK**2
            return f"NVDEC decodes {codec} up to {limit} pixels in a frame, not {width}x{height}"
        return ""


def query_nvdec(device: torch.device) -> Nvdec:
    """Ask the driver for the capabilities of a GPU's NVDEC; asked once per device."""
    if device.type != "cuda":
        return Nvdec(missing="the device is a CPU")
    return _query_gpu(device.index or 0)


def shared_nvdec(parts: Sequence[Nvdec]) -> Nvdec:
    """Capabilities that hold for every one of several GPUs, the ranks' of a job.

    Where one rank has no NVDEC, none uses it; kinds and sizes of videos that one GPU refuses are refused on all. So all
    ranks decode a video by the same decoder.
    """
    for rank, part in enumerate(parts):
        if part.missing:
            return Nvdec(missing=part.missing if len(parts) == 1 else f"rank {rank}: {part.missing}")
    shared = {(kind.codec, kind.chroma, kind.depth): kind for kind in parts[0].formats}
    for part in parts[1:]:
        others = {(kind.codec, kind.chroma, kind.depth): kind for kind in part.formats}
        shared = {key: kind.shared_with(others[key]) for key, kind in shared.items() if key in others}
    return Nvdec(tuple(shared.values()))


@cache
def _query_gpu(index: int) -> Nvdec:
    import torch

    if not torch.cuda.is_available():
        return Nvdec(missing="torch finds no NVIDIA GPU or driver")
    try:
        get_caps = ctypes.CDLL(LIBRARY).cuvidGetDecoderCaps
    except (OSError, AttributeError) as error:
        return Nvdec(
            missing=f"the driver's video library is missing ({error}); a container needs "
            "NVIDIA_DRIVER_CAPABILITIES=all, or video among them"
        )
    get_caps.argtypes, get_caps.restype = [ctypes.POINTER(DecoderCaps)], ctypes.c_int
    with torch.cuda.device(index):
        torch.cuda.synchronize()  # the driver answers for the GPU whose CUDA context is current in this thread
        return read_capabilities(get_caps)


def read_capabilities(get_caps: GetDecoderCaps) -> Nvdec:
    """Ask for every codec, chroma format and bit depth.

    Args:
        get_caps: `cuvidGetDecoderCaps` of the driver; a CUDA context is current.
    """
    formats = []
    for codec, chroma, depth in product(CODECS, CHROMA_FORMATS, BIT_DEPTHS):
        caps = DecoderCaps(codec=CODECS[codec], chroma_format=CHROMA_FORMATS[chroma], bit_depth_minus_8=depth - 8)
        error = get_caps(ctypes.byref(caps))
        if error:
            return Nvdec(missing=f"the driver's video library fails: cuvidGetDecoderCaps returns {error}")
        if caps.supported:
            limits = (caps.min_width, caps.min_height, caps.max_width, caps.max_height, caps.max_macroblocks)
            formats.append(NvdecFormat(codec, chroma, depth, *limits))
    if not formats:
        return Nvdec(missing="the GPU has no NVDEC")
    return Nvdec(tuple(formats))
