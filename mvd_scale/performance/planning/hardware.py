"""Data-sheet figures of GPUs, and the share of their peak that transformers are assumed to reach.

All figures are per GPU in the SXM form factor and for dense arithmetic, which is half of the data sheets' figures with
sparsity. This project measured none of them.

Peaks, memory, bandwidths and NVLink were checked against quotations of the data sheets: glennklockwood.com/garden
(A100, H100, B200), aiwiki.ai (H200), Dell's guide to V100 servers, the table of HGX B200 at zdszero.github.io, which
also has B200's 7 decoders, and torch's out-of-memory messages (H200, B200). No source was found for V100's tensor
cores, the network cards before Hopper, and the other numbers of decoders: these are assumed, from memory.

Decoding rates are in line with NVIDIA's NVDEC Application Note (Video Codec SDK 13.0, table "NVDEC Decoding
Performance", H.264 at 1920x1080 per engine): Pascal 694 frames/s, Turing 771 at 1860 MHz, and "Hopper and GA100 GPUs
contain NVDEC with same architecture as Turing", scaled by the clock. The 450 of an A100's engine and the 729 of an
H100's are quoted from the architecture papers from memory; V100's 480 and B200's rate, taken to be the H100's, are
assumed. The note's 2172 for Blackwell was measured on another chip of that name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mvd_scale.config.training import FrozenPrecision
from mvd_scale.errors import UserError
from mvd_scale.models.quantization import REFUSED
from mvd_scale.training.placement import Capabilities

AttentionKernel = Literal["flash-attn", "sdpa"]

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Gpu:
    """One type of GPU, and the network of the usual host with eight of them."""

    name: str

    memory: float
    """Memory that is available to programs, bytes."""

    peak: dict[FrozenPrecision, float]
    """Peak FLOP/s by precision; fp32 is without TF32, as is torch's default. int8 is absent: it is for CPUs only."""

    bandwidth: float
    """Memory bandwidth, bytes/s."""

    nvlink: float
    """Bytes/s that one GPU can send to the other GPUs of its host."""

    network: float
    """Bytes/s per GPU to other hosts: the bandwidth of the host's network cards divided by eight."""

    decoders: int
    """Number of NVDEC engines; assumed but for B200."""

    decoded: float
    """Decoding rate of all engines for H.264 at 1920x1080, frames/s; see the head of this module."""

    efficiency: dict[AttentionKernel, float]
    """Share of `peak` that transformers of width 1280 reach in half precision, by attention kernel: an assumption."""

    source: str
    """Sources of the figures."""


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="V100",
            memory=31.7 * GIB,
            peak={"fp32": 15.7 * TERA, "fp16": 125 * TERA},
            bandwidth=900 * GIGA,
            nvlink=150 * GIGA,
            network=6.25 * GIGA,
            decoders=1,
            decoded=16 * 30,
            efficiency={"sdpa": 0.35},
            source="V100 SXM2 32 GB data sheet; DGX-1: four cards of 100 Gbit/s; decoding: assumed",
        ),
        Gpu(
            name="A100",
            memory=79.3 * GIB,
            peak={"fp32": 19.5 * TERA, "bf16": 312 * TERA, "fp16": 312 * TERA},
            bandwidth=2039 * GIGA,
            nvlink=300 * GIGA,
            network=25 * GIGA,
            decoders=5,
            decoded=75 * 30,
            efficiency={"flash-attn": 0.50, "sdpa": 0.47},
            source="A100 SXM4 80 GB data sheet; DGX A100: eight cards of 200 Gbit/s; decoding: A100 paper, from memory",
        ),
        Gpu(
            name="H100",
            memory=79.1 * GIB,
            peak={"fp32": 67 * TERA, "bf16": 989 * TERA, "fp16": 989 * TERA, "fp8": 1979 * TERA},
            bandwidth=3350 * GIGA,
            nvlink=450 * GIGA,
            network=50 * GIGA,
            decoders=7,
            decoded=170 * 30,
            efficiency={"flash-attn": 0.42, "sdpa": 0.38},
            source="H100 SXM5 80 GB data sheet; DGX H100: eight cards of 400 Gbit/s; decoding: H100 paper, from memory",
        ),
        Gpu(
            name="H200",
            memory=139.8 * GIB,
            peak={"fp32": 67 * TERA, "bf16": 989 * TERA, "fp16": 989 * TERA, "fp8": 1979 * TERA},
            bandwidth=4800 * GIGA,
            nvlink=450 * GIGA,
            network=50 * GIGA,
            decoders=7,
            decoded=170 * 30,
            efficiency={"flash-attn": 0.43, "sdpa": 0.39},
            source="H200 SXM data sheet; DGX H200: eight cards of 400 Gbit/s; decoding: assumed, as H100",
        ),
        Gpu(
            name="B200",
            memory=178.3 * GIB,
            peak={"fp32": 75 * TERA, "bf16": 2250 * TERA, "fp16": 2250 * TERA, "fp8": 4500 * TERA},
            bandwidth=7700 * GIGA,
            nvlink=900 * GIGA,
            network=50 * GIGA,
            decoders=7,
            decoded=170 * 30,
            efficiency={"flash-attn": 0.35, "sdpa": 0.32},
            source="HGX B200 data sheet; DGX B200: eight cards of 400 Gbit/s; decoding: assumed, as H100",
        ),
    )
}
"""Known GPUs by name."""

_OTHER_FORMS = {"PCIE", "NVL"}
"""Words in the names of GPUs that are slower than the SXM form in the table."""

RESERVED = 1.5 * GIB
"""Bytes that CUDA's context, NCCL's buffers and cuBLAS's workspaces occupy: an assumption."""

FRAGMENTED = 0.05
"""Share of the remaining memory that fragmentation of the caching allocator makes unusable: an assumption."""

LINK_SHARE = 0.8
"""Share of a link's bandwidth that large collectives reach: an assumption."""


def find_gpu(name: str) -> Gpu:
    """Return a type of GPU by its name, in upper or lower case.

    Raises:
        UserError: the table does not contain it.
    """
    if name.upper() not in GPUS:
        raise UserError(f"--gpu {name}: unknown GPU; expected one of {', '.join(GPUS)}")
    return GPUS[name.upper()]


def known_gpu(name: str) -> Gpu | None:
    """Return the type of a GPU from the name that its driver gives; None if the table does not contain it."""
    words = re.split(r"[\s-]", name.upper())
    if _OTHER_FORMS.intersection(words):
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name in words), None)


def find_kernel(gpu: Gpu, name: str | None) -> AttentionKernel:
    """Return the attention kernel of a name, or if None the fastest one of the GPU: flash-attn from Ampere on.

    Raises:
        UserError: the GPU does not support the kernel.
    """
    for kernel in gpu.efficiency:
        if name in (None, kernel):
            return kernel
    raise UserError(f"--attention {name}: {gpu.name} supports {' and '.join(gpu.efficiency)} only")


def capabilities_of(gpu: Gpu) -> Capabilities:
    """Return the capabilities of a type of GPU; torch.compile is assumed to work on its hosts."""
    return Capabilities(gpu=gpu.name, bf16="bf16" in gpu.peak, fp8="fp8" in gpu.peak)


def usable_memory(gpu: Gpu) -> float:
    """Compute the bytes of a GPU's memory that are available for tensors."""
    return (gpu.memory - RESERVED) * (1 - FRAGMENTED)


def width_factor(width: int) -> float:
    """Estimate the share of `Gpu.efficiency` that a transformer narrower than 1280 reaches: an assumption.

    Narrow models have matrix products of few columns, and the cost of norms and activations per FLOP grows as
    1 / width.
    """
    return min(1.0, 2 * width / (width + 1280))


def sustained_flops(
    gpu: Gpu, precision: FrozenPrecision, kernel: AttentionKernel, width: int, efficiency: float | None
) -> float:
    """Estimate the FLOP/s that a transformer of a given width reaches.

    Args:
        gpu: type of GPU.
        precision: precision of weights and arithmetic.
        kernel: attention kernel.
        width: channels of a token.
        efficiency: share of the peak that replaces the table's value; None to use the table.

    Raises:
        UserError: the GPU does not support the precision.
    """
    if precision not in gpu.peak:
        if precision == "int8" or precision == "fp8":
            raise UserError(f"{gpu.name}: {REFUSED[precision]}")
        raise UserError(f"{gpu.name} has no {precision}: set training.precision or teachers.precision to fp16")
    if efficiency is not None:
        return gpu.peak[precision] * efficiency
    # fp32 does not use tensor cores: arithmetic is so slow that memory traffic and launches hardly matter.
    share = 0.75 if precision == "fp32" else gpu.efficiency[kernel] * width_factor(width)
    return gpu.peak[precision] * share
