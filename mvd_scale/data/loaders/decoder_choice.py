"""Choice of the decoders of a run, by `data.decoder` and the rank's device; report of what NVDEC does not take."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Literal

from mvd_scale.config.data import VideoDecoder
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError
from mvd_scale.utils.nvdec import Nvdec

if TYPE_CHECKING:
    from mvd_scale.data.decoding.backends import Decoders
    from mvd_scale.data.manifest import Manifest

_SHOWN = 6
"""Largest number of reasons that a warning lists."""

log = logging.getLogger("mvd_scale")


def choose_video_decoder(
    asked: VideoDecoder | Literal["auto"], *, on_gpu: bool, no_nvdec: str
) -> tuple[VideoDecoder, str]:
    """Choose between NVDEC and the host, and state the reason, phrased to follow the word "because".

    Args:
        asked: `data.decoder`.
        on_gpu: whether the run is on GPUs.
        no_nvdec: reason why the GPUs have no NVDEC; empty if they do.

    Raises:
        UserError: the recipe demands NVDEC, and there is none.
    """
    reason = "the device is a CPU" if not on_gpu else no_nvdec
    if asked == "nvdec" and reason:
        raise UserError(f"data.decoder is nvdec, but there is no NVDEC: {reason}. Set data.decoder to auto or host")
    if asked == "host":
        return "host", "data.decoder is host"
    if reason:
        return "host", f"data.decoder is auto and there is no NVDEC: {reason}" if on_gpu else reason
    return "nvdec", "data.decoder is nvdec" if asked == "nvdec" else "data.decoder is auto and the GPUs have NVDEC"


def choose_decoders(manifest: Manifest, asked: VideoDecoder | Literal["auto"], rank: DataRank) -> Decoders:
    """Choose the decoders of a loader, and warn once of videos that NVDEC does not decode.

    Args:
        manifest: manifest of the videos.
        asked: `data.decoder`.
        rank: rank that the loader serves.

    Raises:
        UserError: see `choose_video_decoder`.
    """
    # Placement, which reads no manifest, imports this module without pyarrow.
    from mvd_scale.data.decoding.backends import Decoders, count_refusals, find_shared_sizes

    on_gpu = rank.device.type == "cuda"
    nvdec = rank.nvdec if on_gpu and asked != "host" else Nvdec()
    chosen, reason = choose_video_decoder(asked, on_gpu=on_gpu, no_nvdec=nvdec.missing)
    if chosen == "host":
        if on_gpu and asked == "auto":
            _warn_once(f"videos are decoded on the CPUs, because {reason}")
        # Without NVDEC, a GPU still decodes JPEG.
        return Decoders(images="mixed" if on_gpu and asked != "host" else "cpu")
    decoders = Decoders("mixed", "mixed", nvdec, find_shared_sizes(manifest))
    refused = count_refusals(manifest, decoders)
    if refused:
        shown = [f"{count} {kind}" for kind, count in refused.most_common(_SHOWN)]
        rest = refused.total() - sum(count for _, count in refused.most_common(_SHOWN))
        _warn_once(
            f"PyAV decodes {refused.total()} of {len(manifest.usable)} videos on the CPUs, not NVDEC: "
            + "; ".join([*shown, *([f"{rest} for other reasons"] if rest else [])])
            + ". `mvd-scale data shard --encode h264` makes files that NVDEC decodes"
        )
    return decoders


@cache
def _warn_once(text: str) -> None:
    # A run makes several loaders of the same videos, such as one for each validation.
    log.warning("%s", text)
