"""Stage (f): decoding by DALI against PyAV, frame by frame, and its speed. Needs DALI and PyAV.

Videos are made here: patterns that move, so that no two frames are alike.

Legend: T frames, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.data.decoding.backends import BT709_FROM_BT601, Decoders
from mvd_scale.data.decoding.dali_graph import convert_colours, decode_video
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.base import as_tensor
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.storage import read_bytes
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.performance.benchmarks.data.videos import encode_pictures
from mvd_scale.performance.bringup.session import Check, LeftOut, Session
from mvd_scale.utils.nvdec import query_nvdec

LEVELS = 3.0
"""Largest mean difference of one frame, in levels of 0 to 255. Both decode the same planes to the bit, and their
conversions to RGB round differently: DALI's decoder of VP9 on the CPU comes to 1.7, another matrix of colours to more
than this."""

_AHEAD = 4
"""Batches that are left over, so that the loader prefetches at the end of the timing as at its start."""


@dataclass(frozen=True)
class VideoKind:
    """Kind of videos: FFmpeg's encoder, width and height in pixels, frames between keyframes."""

    encoder: str
    size: tuple[int, int]
    keyframes: int

    def __str__(self) -> str:
        return f"{self.encoder} {self.size[0]}x{self.size[1]}, a keyframe every {self.keyframes} frames"


KINDS = (
    VideoKind("libx264", (340, 256), 250),
    VideoKind("libx264", (1920, 1080), 250),
    VideoKind("libx264", (320, 240), 12),
    VideoKind("libx265", (340, 256), 250),
    VideoKind("libvpx-vp9", (340, 256), 128),
    VideoKind("libx264", (340, 256), 12),
    VideoKind("libx264", (320, 240), 250),
    VideoKind("libsvtav1", (340, 256), 128),
)
"""Kinds of videos in their order of value. One after the other, sizes that are no multiples of 16 are first: a decoder
that was made for one of them may not fit the next."""

SMALL = (VideoKind("libvpx-vp9", (68, 52), 12),)
"""Kinds of a dry run: DALI decodes VP9 on the CPU."""

FRAMES, COPIES = 60, 8
"""Frames of a video, and videos of a kind for the timing."""


def run(session: Session) -> None:
    """Make the checks of the stage."""
    device = torch.device(session.device)
    kinds = SMALL if session.small else KINDS
    for kind in kinds:
        session.check(f"frames: {kind}", partial(same_frames, kind=kind, device=device, folder=session.folder), 5)
    for kind in kinds:
        session.check(
            f"clips/s: {kind}", partial(clips_per_second, kind=kind, device=device, folder=session.folder), 10
        )


def same_frames(check: Check, kind: VideoKind, device: torch.device, folder: Path) -> None:
    """Compare every frame, in order and as a clip picks them, with the one that PyAV gives."""
    video = make_videos(kind, folder).row(0)
    if reason := refusal(video, device):
        raise LeftOut(reason)
    everything = np.arange(video.frames)
    theirs = decode_frames(video, everything)
    for name, chosen in (("in order", everything), ("of a clip", np.array([7, 7, 9, 21, 40]))):
        ours = frames_by_dali(video, chosen, device)
        levels = np.array([difference(a, theirs[place]) for a, place in zip(ours, chosen, strict=True)])
        check.figure(f"largest mean difference {name}", float(levels.max()))
        check.expect(levels.max() < LEVELS, f"frames {name} differ by less than {LEVELS:g} levels")
    apart = min(difference(a, b) for a, b in pairwise(theirs))
    check.figure("least difference of neighbours", apart)
    check.expect(apart > LEVELS, "neighbours differ, so that a wrong frame would be seen")


def refusal(video: Row, device: torch.device) -> str:
    """Return the reason why NVDEC of a GPU does not decode a video, so that PyAV does; empty if DALI decodes it."""
    if device.type == "cpu":
        return ""
    return query_nvdec(device).refusal(video.codec, video.pixel_format, (video.height, video.width))


def clips_per_second(check: Check, kind: VideoKind, device: torch.device, folder: Path) -> None:
    """Time the loader of training on videos of a kind."""
    batch, steps = (2, 1) if device.type == "cpu" else (16, 8)
    manifest = make_videos(kind, folder)
    whole = steps + 2 + _AHEAD
    data = DataConfig(clips_per_video=-(-whole * batch // len(manifest.usable)), workers="auto")
    plan, model = BatchPlan(batch, batch, range(whole)), ModelConfig.model_validate({"size": "B"})
    with ClipLoader(manifest, data, model, 0, plan=plan, rank=DataRank(device)) as loader:
        list(islice(loader, 2))
        _wait(device)
        started = time.perf_counter()
        list(islice(loader, steps))
        _wait(device)
        check.figure("clips/s", batch * steps / (time.perf_counter() - started))
        check.expect(not loader.substituted, "no video is replaced")


def make_videos(kind: VideoKind, folder: Path) -> Manifest:
    """Encode the videos of a kind, unless an earlier check has done so, and index them.

    Raises:
        LeftOut: PyAV has no such encoder.
    """
    if kind.encoder not in av.codecs_available:
        raise LeftOut(f"this build of PyAV has no {kind.encoder}")
    suffix = ".webm" if "vpx" in kind.encoder else ".mp4"
    name = f"{kind.encoder}_{kind.size[0]}x{kind.size[1]}_{kind.keyframes}"
    paths = [folder / f"{name}_{number}{suffix}" for number in range(COPIES)]
    if not paths[0].exists():
        encode_pictures(paths[0], kind.encoder, kind.size, moving_pictures(kind.size), keyframes=kind.keyframes)
        for path in paths[1:]:
            path.hardlink_to(paths[0])
    return build_manifest([str(path) for path in paths], workers=1)


def moving_pictures(size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Yield `FRAMES` pictures, uint8 (H, W, 3): grey squares that move by some pixels from each to the next.

    Colours change slowly over the picture: decoders interpolate colours at edges differently.
    """
    width, height = size
    side = max(min(size) // 16, 4)
    greys = np.random.default_rng(0).integers(40, 160, (height // side + 1, width // side + 1))
    still = greys.repeat(side, 0).repeat(side, 1)[:height, :width, None]
    down, right = np.arange(height)[:, None] / height, np.arange(width) / width
    colours = 90 * np.stack(np.broadcast_arrays(down, right, 1 - down * right), -1)
    for number in range(FRAMES):
        moved = np.roll(still, (number * side // 2, number * side // 3), (0, 1))
        yield (moved + colours).astype(np.uint8)


def frames_by_dali(video: Row, frames: NDArray[np.int64], device: torch.device) -> NDArray[np.uint8]:
    """Decode frames by DALI alone, in the colours of the stream's tags: uint8 (T, H, W, 3)."""
    encoded, on_gpu = read_bytes(video.path), device.type == "cuda"
    decoders = Decoders("mixed", "mixed") if on_gpu else Decoders()

    @pipeline_def(batch_size=1, num_threads=1, device_id=(device.index or 0) if on_gpu else None)  # type: ignore[untyped-decorator]
    def clip() -> Any:
        data = fn.external_source(lambda: [np.frombuffer(encoded, np.uint8)], dtype=types.UINT8, ndim=1)
        decoded = decode_video(data, frames.tolist(), decoders.videos)
        return convert_colours(decoded, types.Constant(BT709_FROM_BT601)) if decoders.corrects(video) else decoded

    (clips,) = clip().run()
    decoded: NDArray[np.uint8] = as_tensor(clips)[0].cpu().numpy()
    return decoded


def difference(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """Mean absolute difference of two pictures, in levels."""
    return float(np.abs(ours.astype(np.int16) - theirs).mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
